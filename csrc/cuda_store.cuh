// SPDX-License-Identifier: Apache-2.0
// Casts to the element types of results, rounding to nearest.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nimfast {

__device__ __forceinline__ void put(float& out, float value) { out = value; }
__device__ __forceinline__ void put(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void put(__half& out, float value) { out = __float2half_rn(value); }

}  // namespace nimfast
