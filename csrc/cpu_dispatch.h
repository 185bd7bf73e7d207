// SPDX-License-Identifier: Apache-2.0
// Entry points of the CPU kernels: choose the instruction set, split the work among threads.
#pragma once
#include <string>

#include "corrupt.h"
#include "votes.h"

namespace nimfast {

void corrupt_cpu(const CorruptArgs& args, int threads);
void votes_cpu(const VotesArgs& args, int threads);

std::string cpu_level();                       // "x86-64-v4", ..., "portable"
void set_cpu_level(const std::string& level);  // for tests and benchmarks; throws if the build or machine lacks it

}  // namespace nimfast
