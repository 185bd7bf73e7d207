// SPDX-License-Identifier: Apache-2.0
// votes: counts[index[slot], argmax(logits[row])] += 1 for the first valid[slot] rows of every slot.
// A row that holds NaN or an infinity counts in column K. Equal logits: the lowest class.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct VotesArgs {
  const void* logits;    // [slots * rows_per_slot, K], contiguous
  int64_t* counts;       // [G, K + 1], contiguous
  const int64_t* index;  // [slots], in [0, G); a slot with another value is not counted
  const int64_t* valid;  // [slots]
  int64_t slots;
  int64_t rows_per_slot;
  int64_t classes;  // K
  int64_t groups;   // G
  ScalarType type;

  int64_t items() const { return slots * rows_per_slot; }  // rows
  int64_t items_worth_a_thread() const { return classes < 1 << 16 ? (1 << 16) / classes : 1; }
};

void votes_cuda(const VotesArgs& args, void* stream);

}  // namespace nimfast
