// SPDX-License-Identifier: Apache-2.0
// votes on CUDA. A group of lanes reads a row together; a block gathers its winners and adds each distinct
// (group, class) once, because nearly all samples of an image vote alike and would queue at one address.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda_check.cuh"
#include "votes.h"

namespace nimfast {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float get(float value) { return value; }
__device__ __forceinline__ float get(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float get(__half value) { return __half2float(value); }

// kLanes threads per row, so kThreads / kLanes rows per block and round.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) votes_kernel(VotesArgs a) {
  constexpr int kRows = kThreads / kLanes;
  __shared__ int64_t targets[kRows];  // cell of `counts` that each row adds to, or -1
  const int lane = threadIdx.x % kLanes, local_row = threadIdx.x / kLanes;
  const int64_t rows = a.slots * a.rows_per_slot;

  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kRows; base < rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t row = base + local_row;
    float best = -INFINITY;
    int winner = 0x7fffffff;
    bool finite = true;
    if (row < rows) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.classes;
      for (int k = lane; k < a.classes; k += kLanes) {
        const float value = get(logits[k]);
        finite = finite && isfinite(value);
        if (value > best) {
          best = value;
          winner = k;
        }
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, step);
      const int other_winner = __shfl_xor_sync(kAllLanes, winner, step);
      const bool other_finite = __shfl_xor_sync(kAllLanes, static_cast<int>(finite), step);
      if (other > best || (other == best && other_winner < winner)) {
        best = other;
        winner = other_winner;
      }
      finite = finite && other_finite;
    }
    if (lane == 0) {
      int64_t target = -1;
      if (row < rows) {
        const int64_t slot = row / a.rows_per_slot, group = a.index[slot];
        if (row % a.rows_per_slot < a.valid[slot] && group >= 0 && group < a.groups) {
          target = group * (a.classes + 1) + (finite ? winner : a.classes);
        }
      }
      targets[local_row] = target;
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      // Lanes of a warp that hold the same cell elect the lowest, which adds for all of them.
      const unsigned active = __ballot_sync(kRows >= 32 ? kAllLanes : (1u << kRows % 32) - 1u, true);
      const int64_t target = targets[threadIdx.x];
      const unsigned peers = __match_any_sync(active, static_cast<unsigned long long>(target));
      if (target >= 0 && __ffs(peers) - 1 == static_cast<int>(threadIdx.x % 32)) {
        atomicAdd(reinterpret_cast<unsigned long long*>(a.counts + target),
                  static_cast<unsigned long long>(__popc(peers)));
      }
    }
    __syncthreads();
  }
}

template <class T, int kLanes>
void launch_lanes(const VotesArgs& a, cudaStream_t stream) {
  constexpr int kRows = kThreads / kLanes;
  const int64_t blocks = (a.slots * a.rows_per_slot + kRows - 1) / kRows;
  votes_kernel<T, kLanes><<<static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)), kThreads, 0, stream>>>(a);
  check(cudaGetLastError(), "launching votes");
}

template <class T>
void launch(const VotesArgs& a, cudaStream_t stream) {
  if (a.classes <= 16) return launch_lanes<T, 4>(a, stream);
  return launch_lanes<T, 32>(a, stream);
}

}  // namespace

void votes_cuda(const VotesArgs& a, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (a.type) {
    case ScalarType::kFloat32: return launch<float>(a, queue);
    case ScalarType::kBFloat16: return launch<__nv_bfloat16>(a, queue);
    case ScalarType::kFloat16: return launch<__half>(a, queue);
  }
}

}  // namespace nimfast
