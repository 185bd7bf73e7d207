// SPDX-License-Identifier: Apache-2.0
// votes on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "votes.h"

#include "cpu_ops.h"
#include "inline.h"

namespace nimfast {
namespace {

constexpr int kWidth = 16;  // independent maxima, so that the loop vectorises without reordering one

// The running maximum of every kWidth-th logit, and where it first stood.
struct Maxima {
  float best[kWidth];
  int32_t at[kWidth];
  float taint[kWidth];  // sum of 0 * logit: 0 for finite numbers, NaN for the others

  template <class T>
  NIMFAST_HD void look(const T* row, int32_t k, int width) {
    for (int j = 0; j < width; ++j) {
      const float value = load(row[k + j]);
      taint[j] += value * 0.0f;
      at[j] = value > best[j] ? k + j : at[j];
      best[j] = value > best[j] ? value : best[j];
    }
  }
};

// The winning class of a row, or `classes` where a logit is not finite.
template <class T>
inline int64_t winner(const T* row, int32_t classes) {
  Maxima m;
  for (int j = 0; j < kWidth; ++j) {
    m.best[j] = -__builtin_inff();
    m.at[j] = classes;
    m.taint[j] = 0.0f;
  }
  int32_t k = 0;
  for (; k + kWidth <= classes; k += kWidth) m.look(row, k, kWidth);
  m.look(row, k, classes - k);
  float best = m.best[0], taint = m.taint[0];
  int32_t at = m.at[0];
  for (int j = 1; j < kWidth; ++j) {
    const bool better = m.best[j] > best || (m.best[j] == best && m.at[j] < at);
    best = better ? m.best[j] : best;
    at = better ? m.at[j] : at;
    taint += m.taint[j];
  }
  return taint == 0.0f ? at : classes;
}

template <class T>
void votes_range(const VotesArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = row / a.rows_per_slot, group = a.index[slot];
    if (row % a.rows_per_slot >= a.valid[slot] || group < 0 || group >= a.groups) continue;
    const T* logits = static_cast<const T*>(a.logits) + row * a.classes;
    // Several threads may hold rows of one group.
    __atomic_fetch_add(&a.counts[group * (a.classes + 1) + winner(logits, static_cast<int32_t>(a.classes))], int64_t{1},
                       __ATOMIC_RELAXED);
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
