// SPDX-License-Identifier: Apache-2.0
// corrupt: noisy, normalised, cast copies of a batch of images, in one pass.
//   out[b * S + s, c, i] = image[b, c, i] * scale[c] + shift[c] + sigma[b] * scale[c] * normal(key[b], first[b] + s, c,
//   i)
// with scale = 1 / std, shift = -mean / std; or, on the 8-bit grid (grid.h),
//   out[b * S + s, c, i] = (round(255 image[b, c, i]) + whole number(key[b], first[b] + s, c, i)) * scale[c] + shift[c]
// with scale = 1 / (255 std). Value e = (c, i) of sample n stands at position n * C * HW + e of the
// stream key[b].
#pragma once
#include <cstdint>

#include "philox.h"
#include "scalar_types.h"

namespace nimfast {

struct CorruptArgs {
  const float* images;   // [B, C, HW], images image_stride values apart (0: one image for every b)
  const uint64_t* keys;  // [B]
  const int64_t* first;  // [B], number of the first sample
  const float* sigma;    // [B], in pixel units; not read on the grid
  const uint64_t* grid;  // a GridLaw as packed; null: Gaussian noise
  const float* scale;    // [C]
  const float* shift;    // [C]
  void* out;             // [B * S, C, HW], contiguous
  int64_t image_stride;
  int64_t images_count;  // B
  int64_t samples;       // S
  int64_t channels;      // C
  int64_t plane;         // HW
  ScalarType out_type;

  // The CPU works through blocks of values; any split of them among threads gives the same bits. A row that begins
  // inside a quad begins up to three values into its first block.
  int64_t blocks_of_row() const {
    const int64_t values = channels * plane, straddle = values % 4 == 0 ? 0 : 3;
    return (values + straddle + kBlock - 1) / kBlock;
  }
  int64_t items() const { return images_count * samples * blocks_of_row(); }
  // Whether the result outgrows the caches that would hold it for whoever reads it next.
  bool beyond_caches() const {
    const int64_t bytes = out_type == ScalarType::kFloat32 ? 4 : 2;
    return images_count * samples * channels * plane * bytes >= int64_t{32} << 20;
  }
  int64_t items_worth_a_thread() const { return 64; }
};

// Returns after queueing on `stream` (a cudaStream_t). Every pointer is on the current device.
void corrupt_cuda(const CorruptArgs& args, void* stream);

}  // namespace nimfast
