// SPDX-License-Identifier: Apache-2.0
// random_masks: for every sample, the K patches with the smallest of L words of the noise law's generator, ties to the
// lower patch. Word l of sample n is word n * L + l of the sequence of the image's key.
#pragma once
#include <cstdint>

#include "philox.h"

namespace nimfast {

constexpr int64_t kMaxPatches = 4096;  // a row of words stays on the stack; random_masks.py refuses more

struct RandomMasksArgs {
  const uint64_t* keys;  // [B]
  const int64_t* first;  // [B], number of the first sample
  int64_t* kept;         // [B * S, K], increasing
  int64_t* restore;      // [B * S, L], place of each patch in (kept, removed)
  uint8_t* mask;         // [B * S, L], 1 = removed
  int64_t images_count;  // B
  int64_t samples;       // S
  int64_t patches;       // L, at most kMaxPatches
  int64_t kept_count;    // K, in [1, L]

  int64_t items() const { return images_count * samples; }  // rows
  int64_t items_worth_a_thread() const { return 1 + (1 << 13) / patches; }
};

}  // namespace nimfast
