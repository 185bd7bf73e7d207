// SPDX-License-Identifier: Apache-2.0
// votes on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "votes.h"

#include "cpu_ops.h"
#include "inline.h"

namespace nimfast {
namespace {

constexpr int kWidth = 16;  // logits looked at together; the compiler makes one to four registers of them
typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kWidth * sizeof(uint32_t))));

// `count` logits, then `rest`.
template <class T>
inline Floats load_some(const T* row, int count, float rest) {
  float values[kWidth];
  for (int j = 0; j < kWidth; ++j) values[j] = j < count ? load(row[j]) : rest;
  Floats loaded;
  __builtin_memcpy(&loaded, values, sizeof(loaded));
  return loaded;
}

// The winning class of a row, or `classes` where a logit is not finite; for so few that vectors do not pay.
template <class T>
inline int64_t winner_of_few(const T* row, int32_t classes) {
  float best = load(row[0]);
  int32_t winner = 0;
  uint32_t largest = 0;
  for (int32_t k = 0; k < classes; ++k) {
    const float value = load(row[k]);
    const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
    winner = value > best ? k : winner;
    best = value > best ? value : best;
  }
  return largest >= 0x7f800000u ? classes : winner;
}

// The same for any number. First the maximum, then where it first stands: two passes, because carrying the places along
// costs more than reading a row that lies in the cache again.
template <class T>
inline int64_t winner(const T* row, int32_t classes) {
  Floats best = load_some(row, 0, -__builtin_inff());
  Bits magnitude{};  // of the bits without the sign, in which infinities and NaN come last
  int32_t k = 0;
  const auto look = [&best, &magnitude](Floats value) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bits &= 0x7fffffffu;
    best = value > best ? value : best;
    magnitude = bits > magnitude ? bits : magnitude;
  };
  for (; k + kWidth <= classes; k += kWidth) look(load_some(row + k, kWidth, 0.0f));
  look(load_some(row + k, classes - k, load(row[0])));  // filled with a logit of the row, which changes nothing
  float top = best[0];
  uint32_t largest = magnitude[0];
  for (int j = 1; j < kWidth; ++j) {
    top = best[j] > top ? best[j] : top;
    largest = magnitude[j] > largest ? magnitude[j] : largest;
  }
  if (largest >= 0x7f800000u) return classes;
  const Floats tops = Floats{} + top;
  Bits place{}, first = Bits{} + static_cast<uint32_t>(classes);
  for (int j = 0; j < kWidth; ++j) place[j] = static_cast<uint32_t>(j);
  const auto find = [&place, &first, tops](Floats value) {
    const Bits found = value == tops ? place : Bits{} + 0xffffffffu;
    first = found < first ? found : first;
    place += kWidth;
  };
  for (k = 0; k + kWidth <= classes; k += kWidth) find(load_some(row + k, kWidth, 0.0f));
  find(load_some(row + k, classes - k, -__builtin_inff()));
  uint32_t lowest = first[0];
  for (int j = 1; j < kWidth; ++j) lowest = first[j] < lowest ? first[j] : lowest;
  return lowest;
}

template <class T>
void votes_range(const VotesArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = row / a.rows_per_slot, group = a.index[slot];
    if (row % a.rows_per_slot >= a.valid[slot] || group < 0 || group >= a.groups) continue;
    const T* logits = static_cast<const T*>(a.logits) + row * a.classes;
    // Several threads may hold rows of one group.
    const auto classes = static_cast<int32_t>(a.classes);
    const int64_t column = classes <= kWidth ? winner_of_few(logits, classes) : winner(logits, classes);
    __atomic_fetch_add(&a.counts[group * (a.classes + 1) + column], int64_t{1}, __ATOMIC_RELAXED);
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
