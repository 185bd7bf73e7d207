// SPDX-License-Identifier: Apache-2.0
// corrupt_patches: rows of the patches kept of corrupt's result, the others never drawn.
//   out[n, k, (r * p + x) * C + c] = corrupt(...)[n, c, y * p + r, z * p + x],  (y, z) = patch kept[n, k] of the grid
// The noise is that of corrupt (corrupt.h), by the value's place in the image.
#pragma once
#include <algorithm>
#include <cstdint>

#include "philox.h"
#include "scalar_types.h"

namespace nimfast {

struct CorruptPatchesArgs {
  const float* images;   // [B, C, H, W], images image_stride values apart (0: one image for every b)
  const uint64_t* keys;  // [B]
  const int64_t* first;  // [B], number of the first sample
  const float* sigma;    // [B], in pixel units; not read on the grid
  const uint64_t* grid;  // a GridLaw as packed; null: Gaussian noise
  const float* scale;    // [C]
  const float* shift;    // [C]
  const int64_t* kept;   // [B * S, K], in [0, H / p * W / p); null: every patch, in order
  void* out;             // [B * S, K, p * p * C], contiguous
  int64_t image_stride;
  int64_t images_count;  // B
  int64_t samples;       // S
  int64_t channels;      // C
  int64_t height;        // H
  int64_t width;         // W
  int64_t patch;         // p, divides H and W
  int64_t kept_count;    // K
  ScalarType out_type;

  // The CPU draws a block of quads at once, for as many runs as fit; a run is a patch's row, or a piece of a row too
  // wide for a block. An item is the runs of one block, in every channel.
  static constexpr int64_t run_length(int64_t patch) { return patch < kBlock - 4 ? patch : kBlock - 4; }
  static constexpr int64_t quads_of_run(int64_t patch) {
    // The width is a multiple of p, so a run begins at a multiple of gcd(p, 4): up to 0, 2 or 3 values into a quad.
    const int64_t into = patch % 4 == 0 ? 0 : patch % 2 == 0 ? 2 : 3;
    return (into + run_length(patch) + 3) / 4;
  }
  int64_t run_length() const { return run_length(patch); }
  int64_t quads_of_run() const { return quads_of_run(patch); }
  int64_t runs_of_row() const { return (patch + run_length() - 1) / run_length(); }  // of a patch's row
  int64_t runs_of_item() const { return kBlockQuads / quads_of_run(); }
  int64_t runs_of_sample() const { return kept_count * patch * runs_of_row(); }
  int64_t items_of_sample() const { return (runs_of_sample() + runs_of_item() - 1) / runs_of_item(); }
  int64_t items() const { return images_count * samples * items_of_sample(); }
  int64_t items_worth_a_thread() const { return channels < 64 ? 64 / channels : 1; }
};

// A patch out of range becomes NaN: no image is read outside, and nothing waits for the device to find out.
void corrupt_patches_cuda(const CorruptPatchesArgs& args, void* stream);

}  // namespace nimfast
