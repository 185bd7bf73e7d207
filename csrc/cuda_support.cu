// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "cuda_support.h"

namespace nimfast {
namespace {
__global__ void probe() {}
}  // namespace

std::string cuda_problem() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA " + std::to_string(driver / 1000) + ", this build needs CUDA " +
           std::to_string(CUDART_VERSION / 1000);
  }
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);  // fails where no architecture of ours fits
  if (status != cudaSuccess) {
    cudaGetLastError();  // leave no error behind for torch to find
    return cudaGetErrorString(status);
  }
  return "";
}

}  // namespace nimfast
