// SPDX-License-Identifier: Apache-2.0
// A transformer block with frozen weights, and its gradient by the input:
//   m = x + proj(attention(qkv(norm1(x)))),  out = m + fc2(gelu(fc1(norm2(m)))).
// A thread takes a few images through all of it, so that what the steps hand on stays in its cache. Sums, norms and
// both residuals are fp32; what products read is rounded to the type of x. Widths are even.
#pragma once
#include <algorithm>
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct FrozenNorm {
  const float *weight, *bias;  // [width]
  float eps;
};

struct FrozenLinear {
  const float* words;   // as `pack` leaves them, on the same instruction set
  const float* bias;    // [width], filled up with zeros to a multiple of 16
  const float* across;  // the same matrix packed the other way round, for the gradient; else null
  int64_t depth, width;
};

struct BlockLayers {
  FrozenNorm norm1;
  FrozenLinear qkv, proj;
  FrozenNorm norm2;
  FrozenLinear fc1, fc2;
  int64_t heads;
  float scale;
};

struct TransformerBlockArgs {
  static constexpr int64_t kRowsOfItem = 48;  // at least one image

  const BlockLayers* layers;
  const void* gradient;        // of the result; transformer_block_backward alone
  const void* x;               // [images, tokens, width], contiguous, as gradient and out
  void* out;                   // the result, or the gradient of x
  void *qkv, *middle, *slope;  // kept for the gradient, as x but of the layers' widths: what attention reads, m, the
                               // derivative of gelu. Null where no gradient is wanted.
  int64_t images, tokens;
  ScalarType type;  // float32 or bfloat16

  int64_t images_of_item() const { return std::max<int64_t>(1, kRowsOfItem / tokens); }
  int64_t items() const { return (images + images_of_item() - 1) / images_of_item(); }
  int64_t items_worth_a_thread() const {
    const int64_t width = layers->fc2.width, hidden = layers->fc1.width;
    return 1 + (1 << 20) / (images_of_item() * tokens * width * (4 * width + 2 * hidden));
  }
};

}  // namespace nimfast
