// SPDX-License-Identifier: Apache-2.0
// corrupt_patches on CUDA. A thread owns a group of neighbouring pixels of a patch's row, in every channel: a quad
// where quads begin at multiples of four pixels (patch sizes that are multiples of 4), half a quad or a pixel
// otherwise, which draws each quad twice or four times. Grey and colour images leave through shared memory, where a
// warp puts its values in the order of the output, 16 bytes a store; other numbers of channels leave value by value.
#include <algorithm>
#include <type_traits>

#include "corrupt_patches.h"
#include "cuda_check.cuh"
#include "cuda_noise.cuh"
#include "cuda_store.cuh"
#include "philox.h"

namespace nimfast {
namespace {

constexpr int kThreads = 256, kWarp = 32;

// Division of numbers below 2^31 by one known at launch; the hardware has none, and 16 instructions stand in for it.
struct Divisor {
  uint32_t value, factor, shift;

  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  __device__ uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(number) * factor) >> shift);
  }
};

// What the kernel needs beside the arguments, in 32 bits.
struct Shape {
  Divisor groups_of_patch, groups_of_row, grid_width;
  uint32_t patches;         // L
  uint32_t groups, values;  // of the kept patches of one sample
  bool packets;             // whether those of every sample begin at a multiple of 16 bytes
};

// The values of a thread's group, moved in words of up to 16 bytes.
template <class T, int kCount>
union Packet {
  static constexpr int kBytes = sizeof(T) * kCount;
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes % 8 == 0, uint2, std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>>;
  T values[kCount];
  Word words[kBytes / sizeof(Word)];
  __device__ Packet() {}
};

// kPixels noisy pixels, of which the first stands at `position`.
template <class Law, int kPixels>
__device__ __forceinline__ void draw(const Law& law, uint64_t key, uint64_t position, float scale, float shift,
                                     const float* source, float (&values)[kPixels]) {
  const uint64_t quad = position / 4;
  const Quad words = philox(key, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32));
  const auto noisy = [&](float noise, float x) { return law.add(noise, law.prepare(x, scale, shift), scale, shift); };
  if constexpr (kPixels == 4) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(source));
    const Pair p = law.pair(key, quad, words.x0, words.x1, 0), q = law.pair(key, quad, words.x2, words.x3, 2);
    values[0] = noisy(p.a, x.x);
    values[1] = noisy(p.b, x.y);
    values[2] = noisy(q.a, x.z);
    values[3] = noisy(q.b, x.w);
  } else {
    const bool upper = position & 2;
    const Pair p = law.pair(key, quad, upper ? words.x2 : words.x0, upper ? words.x3 : words.x1, upper ? 2 : 0);
    if constexpr (kPixels == 2) {
      values[0] = noisy(p.a, source[0]);
      values[1] = noisy(p.b, source[1]);
    } else {
      values[0] = noisy(position & 1 ? p.b : p.a, source[0]);
    }
  }
}

// Stores the warp's groups, one packet a lane, at `out`, where they lie one after the other. Packets that are not 16
// bytes long are regrouped in `memory` first.
template <bool kAligned, class T, int kCount>
__device__ __forceinline__ void store_warp(const Packet<T, kCount>& packet, uint32_t lane, uint32_t groups,
                                           bool aligned, unsigned char* memory, T* out) {
  using Values = Packet<T, kCount>;
  constexpr uint32_t kSize = sizeof(Values), kWords = kSize / sizeof(typename Values::Word);
  if constexpr (kAligned && kSize == sizeof(uint4)) {
    if (lane < groups) reinterpret_cast<uint4*>(out)[lane] = packet.words[0];
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      reinterpret_cast<typename Values::Word*>(memory)[lane * kWords + i] = packet.words[i];
    }
    __syncwarp();
    if (kAligned || aligned) {
#pragma unroll
      for (uint32_t i = lane; i < kWarp * kSize / sizeof(uint4); i += kWarp) {
        if (i < groups * kSize / sizeof(uint4)) {
          reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(memory)[i];
        }
      }
    } else {
#pragma unroll
      for (uint32_t i = lane; i < kWarp * kCount; i += kWarp) {
        if (i < groups * kCount) out[i] = reinterpret_cast<const T*>(memory)[i];
      }
    }
    __syncwarp();  // before the next sample's values replace these
  }
}

// Grid: x over groups of a sample's pixels, y over images, z over samples; y and z stride where the grid is too
// small.
template <class Law, class T, int kChannels, int kPixels>  // kChannels 0: any number
__global__ void __launch_bounds__(kThreads, Law::kBlocks) corrupt_patches_kernel(CorruptPatchesArgs a, Shape shape) {
  const uint32_t lane = threadIdx.x % kWarp, tile = blockIdx.x * kThreads + threadIdx.x - lane;  // the warp's first
  if (tile >= shape.groups) return;
  const uint32_t groups = min(shape.groups - tile, kWarp);
  const uint32_t group = tile + min(lane, groups - 1);  // lanes left over repeat the last and store nothing
  const uint32_t k = shape.groups_of_patch.quotient(group), within = group - k * shape.groups_of_patch.value;
  const uint32_t row = shape.groups_of_row.quotient(within), column = within - row * shape.groups_of_row.value;
  const uint32_t width = static_cast<uint32_t>(a.width), plane = static_cast<uint32_t>(a.height) * width;
  const uint32_t patch = static_cast<uint32_t>(a.patch), offset = row * width + column * kPixels;
  const uint32_t channels = kChannels ? kChannels : static_cast<uint32_t>(a.channels), values = channels * plane;
  T* tile_out = static_cast<T*>(a.out) + static_cast<int64_t>(tile) * kPixels * channels;
  constexpr int kKnown = kChannels ? kChannels : 1;
  float scales[kKnown], shifts[kKnown];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    scales[c] = a.scale[c];
    shifts[c] = a.shift[c];
  }

  for (int64_t b = blockIdx.y; b < a.images_count; b += gridDim.y) {
    const uint64_t key = a.keys[b];
    const float* image = a.images + b * a.image_stride;
    const Law law_of_image = Law::of(a, b);
    // Those of the sample, moved on by additions: products of 64 bits in the loop would cost more.
    const int64_t sample = b * a.samples + blockIdx.z;
    int64_t place = sample * a.kept_count + k;
    T* out = tile_out + sample * shape.values;
    uint64_t begin = (static_cast<uint64_t>(a.first[b]) + blockIdx.z) * values;
    for (int64_t s = blockIdx.z; s < a.samples; s += gridDim.z) {
      // A patch out of range: NaN, wherever in the image it is read.
      const int64_t kept = a.kept ? a.kept[place] : k;
      const bool known = static_cast<uint64_t>(kept) < shape.patches;
      const Law law = known ? law_of_image : law_of_image.unknown();
      const uint32_t l = known ? static_cast<uint32_t>(kept) : 0, l_row = shape.grid_width.quotient(l);
      const uint32_t at = (l_row * width + (l - l_row * shape.grid_width.value)) * patch + offset;
      const uint64_t start = begin + at;

      if constexpr (kChannels == 0) {
        for (uint32_t c = 0; c < channels; ++c) {
          const float scale = a.scale[c];
          float drawn[kPixels];
          draw(law, key, start + c * plane, scale, a.shift[c], image + at + c * plane, drawn);
          if (lane >= groups) continue;
          for (int i = 0; i < kPixels; ++i) put(out[(lane * kPixels + i) * channels + c], drawn[i]);
        }
      } else {
        using Values = Packet<T, kPixels * kChannels>;
        __shared__ alignas(16) unsigned char memory[kThreads * sizeof(Values)];
        Values packet;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          float drawn[kPixels];
          draw(law, key, start + c * plane, scales[c], shifts[c], image + at + c * plane, drawn);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) put(packet.values[i * kChannels + c], drawn[i]);
        }
        unsigned char* own = memory + (threadIdx.x - lane) * sizeof(Values);  // the warp's
        store_warp<kPixels == 4>(packet, lane, groups, shape.packets, own, out);
      }
      place += gridDim.z * a.kept_count;
      out += static_cast<int64_t>(gridDim.z) * shape.values;
      begin += static_cast<uint64_t>(gridDim.z) * values;
    }
  }
}

template <class Law, class T, int kChannels, int kPixels>
void launch_shape(const CorruptPatchesArgs& a, cudaStream_t stream) {
  const int64_t values = a.channels * a.height * a.width, size = a.patch * a.patch;
  if (values > INT32_MAX) throw std::invalid_argument("corrupt_patches: an image may have at most 2^31 - 1 values");
  const int64_t kept_values = a.kept_count * size * a.channels;
  if (kept_values > INT32_MAX) {
    throw std::invalid_argument("corrupt_patches: the kept patches of a sample may have at most 2^31 - 1 values");
  }
  const int64_t groups = a.kept_count * size / kPixels, columns = (groups + kThreads - 1) / kThreads;
  const int64_t grid_width = a.width / a.patch;
  const Shape shape{Divisor(size / kPixels),
                    Divisor(a.patch / kPixels),
                    Divisor(grid_width),
                    static_cast<uint32_t>(a.height / a.patch * grid_width),
                    static_cast<uint32_t>(groups),
                    static_cast<uint32_t>(kept_values),
                    kept_values * sizeof(T) % 16 == 0};
  const int64_t rows = std::min<int64_t>(a.images_count, 65535);
  // As in corrupt.cu: enough blocks to fill a GPU several times over, and as many samples per thread as that leaves.
  constexpr int64_t kBlocksWanted = 8192;
  const int64_t depth = std::clamp<int64_t>(kBlocksWanted / (columns * rows), 1, std::min<int64_t>(a.samples, 65535));
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows), static_cast<unsigned>(depth));
  corrupt_patches_kernel<Law, T, kChannels, kPixels><<<grid, kThreads, 0, stream>>>(a, shape);
  check(cudaGetLastError(), "launching corrupt_patches");
}

template <class Law, class T, int kChannels>
void launch_channels(const CorruptPatchesArgs& a, cudaStream_t stream) {
  // torch aligns allocations to 512 bytes, but a view may begin anywhere.
  const bool aligned = reinterpret_cast<uintptr_t>(a.images) % 16 == 0 && a.image_stride % 4 == 0;
  if (a.patch % 4 == 0 && aligned) return launch_shape<Law, T, kChannels, 4>(a, stream);
  if (a.patch % 2 == 0) return launch_shape<Law, T, kChannels, 2>(a, stream);
  return launch_shape<Law, T, kChannels, 1>(a, stream);
}

template <class Law, class T>
void launch_law(const CorruptPatchesArgs& a, cudaStream_t stream) {
  if (a.channels == 1) return launch_channels<Law, T, 1>(a, stream);
  if (a.channels == 3) return launch_channels<Law, T, 3>(a, stream);
  return launch_channels<Law, T, 0>(a, stream);
}

template <class T>
void launch(const CorruptPatchesArgs& a, cudaStream_t stream) {
  a.grid ? launch_law<Grid, T>(a, stream) : launch_law<Gaussian, T>(a, stream);
}

}  // namespace

void corrupt_patches_cuda(const CorruptPatchesArgs& a, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (a.out_type) {
    case ScalarType::kFloat32: return launch<float>(a, queue);
    case ScalarType::kBFloat16: return launch<__nv_bfloat16>(a, queue);
    case ScalarType::kFloat16: return launch<__half>(a, queue);
  }
}

}  // namespace nimfast
