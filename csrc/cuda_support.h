// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

namespace nimfast {

// Why the CUDA kernels of this build cannot run on the current device; empty when they can.
std::string cuda_problem();

}  // namespace nimfast
