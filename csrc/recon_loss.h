// SPDX-License-Identifier: Apache-2.0
// recon_loss: for every patch, the sum over its values of |prediction - target|^p and, where it is wanted, the gradient
//   weight * (prediction - target) * 2   (p = 2),   weight * sign(prediction - target)   (p = 1).
// The target is the patch of the clean image, x * scale[c] + shift[c], with norm_pix standardised by the patch's own
// mean and unbiased variance; it exists in the cache only. A patch row is in (row, column, channel) order.
//
// There is no CUDA file: the operation reads and writes each value once and computes next to nothing, so on a GPU the
// memory limits it, and Triton loads and stores as wide as CUDA would.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct ReconLossArgs {
  const void* prediction;     // [B * S, L, D], rows [L, D] prediction_stride values apart
  const float* images;        // [B, C, H, W], images image_stride values apart
  const unsigned char* mask;  // [B * S, L], 0: not counted; null: all are
  const float* scale;         // [C]
  const float* shift;         // [C]
  const float* weight;        // [1]
  float* losses;              // [B * S, L], 0 where not counted
  void* gradient;             // [B * S, L, D], contiguous, of the prediction's type; null: not wanted
  int64_t prediction_stride;
  int64_t image_stride;
  int64_t images_count;  // B
  int64_t samples;       // S
  int64_t channels;      // C
  int64_t height;        // H
  int64_t width;         // W
  int64_t patch;
  int64_t norm_pix;
  int64_t power;  // p
  ScalarType type;

  int64_t patches() const { return (height / patch) * (width / patch); }  // L
  int64_t values() const { return patch * patch * channels; }             // D
  // A patch of an image with all its samples, which share the target.
  int64_t items() const { return images_count * patches(); }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / (values() * samples); }
};

}  // namespace nimfast
