// SPDX-License-Identifier: Apache-2.0
// votes on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "votes.h"

#include <algorithm>

#include "cpu_levels.h"

namespace nimfast {
namespace {

// The winning class of a row, or `classes` where a logit is not finite.
template <class T>
inline int64_t winner(const T* row, int64_t classes) {
  constexpr int kWidth = 16;  // independent maxima, so that the loop vectorises without reordering one
  float best[kWidth], taint[kWidth];
  std::fill(best, best + kWidth, -__builtin_inff());
  std::fill(taint, taint + kWidth, 0.0f);
  int64_t k = 0;
  for (; k + kWidth <= classes; k += kWidth) {
    for (int j = 0; j < kWidth; ++j) {
      const float value = load(row[k + j]);
      taint[j] += value * 0.0f;  // 0 for finite numbers, NaN for the others
      best[j] = value > best[j] ? value : best[j];
    }
  }
  for (; k < classes; ++k) {
    const float value = load(row[k]);
    taint[0] += value * 0.0f;
    best[0] = value > best[0] ? value : best[0];
  }
  float maximum = best[0], total = taint[0];
  for (int j = 1; j < kWidth; ++j) {
    maximum = std::max(maximum, best[j]);
    total += taint[j];
  }
  if (total != 0.0f) return classes;
  for (k = 0; load(row[k]) != maximum; ++k) {
  }
  return k;
}

template <class T>
void votes_range(const VotesArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = row / a.rows_per_slot, group = a.index[slot];
    if (row % a.rows_per_slot >= a.valid[slot] || group < 0 || group >= a.groups) continue;
    const T* logits = static_cast<const T*>(a.logits) + row * a.classes;
    // Several threads may hold rows of one group.
    __atomic_fetch_add(&a.counts[group * (a.classes + 1) + winner(logits, a.classes)], int64_t{1}, __ATOMIC_RELAXED);
  }
}

}  // namespace

void NIMFAST_LEVEL::votes(const VotesArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return votes_range<float>(args, begin, end);
    case ScalarType::kBFloat16: return votes_range<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return votes_range<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
