// SPDX-License-Identifier: Apache-2.0
// corrupt on CUDA. A thread owns kVector neighbouring values of an image, reads them once and writes them in every
// sample, 16 bytes a store. Images whose planes are no multiple of kVector take the one-value path, which draws each
// quad four times: right, about a quarter of the speed.
#include <algorithm>

#include "corrupt.h"
#include "cuda_check.cuh"
#include "cuda_noise.cuh"
#include "cuda_store.cuh"
#include "philox.h"

namespace nimfast {
namespace {

constexpr int kThreads = 256;

// kCount values that leave in one store. The compiler splits the copy of a struct of values into its members, so the
// store goes through a 128-bit type.
template <class T, int kCount>
union Packet {
  static_assert(sizeof(T) * kCount == sizeof(uint4), "a packet is 16 bytes");
  T values[kCount];
  uint4 bytes;
  __device__ Packet() {}
};

// Grid: x over groups of kVector values, y over images, z over samples; y and z stride where the grid is too small.
template <class Law, class T, int kVector>
__global__ void __launch_bounds__(kThreads) corrupt_kernel(CorruptArgs a) {
  const uint32_t values = static_cast<uint32_t>(a.channels * a.plane);  // 32 bits: a 64-bit division is a long call
  const uint32_t e = (blockIdx.x * kThreads + threadIdx.x) * kVector;
  if (e >= values) return;
  const uint32_t c = e / static_cast<uint32_t>(a.plane);  // a group never crosses a channel
  const float scale = a.scale[c], shift = a.shift[c];

  for (int64_t b = blockIdx.y; b < a.images_count; b += gridDim.y) {
    const uint64_t key = a.keys[b];
    const uint64_t first = static_cast<uint64_t>(a.first[b]);
    const Law law = Law::of(a, b);
    float clean[kVector];
    if constexpr (kVector % 4 == 0) {
      const float4* source = reinterpret_cast<const float4*>(a.images + b * a.image_stride + e);
#pragma unroll
      for (int i = 0; i < kVector / 4; ++i) {
        const float4 x = __ldg(source + i);
        clean[4 * i] = law.prepare(x.x, scale, shift);
        clean[4 * i + 1] = law.prepare(x.y, scale, shift);
        clean[4 * i + 2] = law.prepare(x.z, scale, shift);
        clean[4 * i + 3] = law.prepare(x.w, scale, shift);
      }
    } else {
      clean[0] = law.prepare(a.images[b * a.image_stride + e], scale, shift);
    }

    for (int64_t s = blockIdx.z; s < a.samples; s += gridDim.z) {
      const uint64_t position = (first + static_cast<uint64_t>(s)) * values + e;
      T* out = static_cast<T*>(a.out) + (b * a.samples + s) * values + e;
      if constexpr (kVector % 4 == 0) {
        Packet<T, kVector> packet;
#pragma unroll
        for (int i = 0; i < kVector / 4; ++i) {
          const uint64_t quad = position / 4 + i;
          const Quad words = philox(key, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32));
          const Pair p = law.pair(key, quad, words.x0, words.x1, 0), q = law.pair(key, quad, words.x2, words.x3, 2);
          put(packet.values[4 * i], law.add(p.a, clean[4 * i], scale, shift));
          put(packet.values[4 * i + 1], law.add(p.b, clean[4 * i + 1], scale, shift));
          put(packet.values[4 * i + 2], law.add(q.a, clean[4 * i + 2], scale, shift));
          put(packet.values[4 * i + 3], law.add(q.b, clean[4 * i + 3], scale, shift));
        }
        *reinterpret_cast<uint4*>(out) = packet.bytes;
      } else {
        const uint64_t quad = position / 4;
        const Quad words = philox(key, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32));
        const bool upper = position & 2;
        const Pair p = law.pair(key, quad, upper ? words.x2 : words.x0, upper ? words.x3 : words.x1, upper ? 2 : 0);
        put(*out, law.add(position & 1 ? p.b : p.a, clean[0], scale, shift));
      }
    }
  }
}

template <class Law, class T, int kVector>
void launch_width(const CorruptArgs& a, cudaStream_t stream) {
  const int64_t values = a.channels * a.plane;
  if (values > INT32_MAX) throw std::invalid_argument("corrupt: an image may have at most 2^31 - 1 values");
  const int64_t columns = (values + kThreads * kVector - 1) / (kThreads * kVector);
  const int64_t rows = std::min<int64_t>(a.images_count, 65535);
  // Enough blocks to fill any present GPU several times over, and as many samples per thread as that leaves.
  constexpr int64_t kBlocksWanted = 8192;
  const int64_t depth = std::clamp<int64_t>(kBlocksWanted / (columns * rows), 1, std::min<int64_t>(a.samples, 65535));
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows), static_cast<unsigned>(depth));
  corrupt_kernel<Law, T, kVector><<<grid, kThreads, 0, stream>>>(a);
  check(cudaGetLastError(), "launching corrupt");
}

template <class Law, class T>
void launch_law(const CorruptArgs& a, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  // torch aligns allocations to 512 bytes, but a view may begin anywhere.
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = a.plane % kWide == 0 && a.image_stride % 4 == 0 && aligned(a.images) && aligned(a.out);
  wide ? launch_width<Law, T, kWide>(a, stream) : launch_width<Law, T, 1>(a, stream);
}

template <class T>
void launch(const CorruptArgs& a, cudaStream_t stream) {
  a.grid ? launch_law<Grid, T>(a, stream) : launch_law<Gaussian, T>(a, stream);
}

}  // namespace

void corrupt_cuda(const CorruptArgs& a, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (a.out_type) {
    case ScalarType::kFloat32: return launch<float>(a, queue);
    case ScalarType::kBFloat16: return launch<__nv_bfloat16>(a, queue);
    case ScalarType::kFloat16: return launch<__half>(a, queue);
  }
}

}  // namespace nimfast
