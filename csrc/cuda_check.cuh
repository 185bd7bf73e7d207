// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nimfast {

inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("nimfast CUDA: ") + doing + ": " + cudaGetErrorString(status));
}

}  // namespace nimfast
