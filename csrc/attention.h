// SPDX-License-Identifier: Apache-2.0
// attention: softmax(scale q k') v of every head, from one tensor [B, N, 3 * H * D] that holds the heads' queries, then
// keys, then values, as a linear layer leaves them; and its gradient by that tensor. Nothing is copied in memory first,
// and probabilities exist in the cache only: the gradient computes them anew from its input, so that nothing else is
// kept for it. A head's keys, values and some rows of probabilities must fit the cache, so this is for sequences of
// up to about a thousand tokens.
//
// Sums are fp32. Values that are multiplied are fp32, or bfloat16 where both the tensor is and the processor has
// AVX512_BF16: then probabilities are rounded to bfloat16 as well.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct AttentionArgs {
  const void* gradient;  // [B, N, H * D], contiguous: of the result; attention_backward alone
  const void* qkv;       // [B, N, 3 * H * D], its last axis dense
  void* out;             // contiguous: [B, N, H * D], or of attention_backward [B, N, 3 * H * D]
  int64_t batch_stride;  // of qkv, values
  int64_t token_stride;  // of qkv, values
  int64_t batch;         // B
  int64_t tokens;        // N
  int64_t heads;         // H
  int64_t head_size;     // D
  float scale;           // positive
  ScalarType type;

  int64_t items() const { return batch * heads; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 18) / (tokens * (tokens + 16) * head_size); }
};

}  // namespace nimfast
