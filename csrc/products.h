// SPDX-License-Identifier: Apache-2.0
// Rows times a matrix that `pack` has laid out, and what commonly follows. Included once by every file that multiplies
// so; all of it is that file's own, for it differs between instruction sets.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu_memory.h"
#include "tiles.h"

namespace nimfast {
namespace {

// The words that values of type T are multiplied in.
#if defined(__AVX512BF16__)
template <class T>
using FormatOf = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Singles>;
#else
template <class T>
using FormatOf = Singles;
#endif

constexpr int64_t kPanel = kColumns * kLanes;
constexpr int64_t kPadding = 16;  // a packed matrix has multiples of it, filled with zeros

// A matrix [depth, width] in panels of neighbouring columns, each word by word along the sum.
struct Packed {
  const float* words;
  int64_t depth, width;
};

// Calls finish(row, column, sums) for every vector of rows [0, rows) of x w, x having rows of an even number of values,
// `stride` apart. The last vector of a row holds zeros above the width.
template <class T, class Finish>
NIMFAST_HD void multiply_rows(const T* x, int64_t stride, int64_t rows, const Packed& w, Finish finish) {
  using Format = FormatOf<T>;
  constexpr bool kInPlace = std::is_same_v<Format, Singles> == std::is_same_v<T, float>;  // words lie as they are read
  const int64_t words = Format::words(w.depth), panel_words = Format::words(round_up(w.depth, kPadding));
  const int64_t width = round_up(w.width, kPadding);
  float* room = kInPlace ? nullptr : thread_scratch(kRows * w.depth);
  alignas(64) float sums[kRows * kPanel];
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t panel = std::min(kPanel, width - column);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - first);
      const float* left = reinterpret_cast<const float*>(x + first * stride);
      int64_t step = stride * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(float));
      if constexpr (!kInPlace) {
        for (int64_t r = 0; r < count; ++r) Format::read(x + (first + r) * stride, w.depth, room + r * words, words);
        left = room;
        step = words;
      }
      tile_of<Format>(count, panel / kLanes,
                      {left, step, 1, w.words + column * panel_words, panel, words, sums, kPanel});
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < std::min(panel, w.width - column); i += kLanes) {
          finish(first + r, column + i, load_lanes(sums + r * kPanel + i));
        }
      }
    }
  }
}

// gelu(x) = x Phi(x), and its derivative Phi(x) + x phi(x). Phi is 1/2 and an odd minimax quotient of polynomials,
// within 1e-8 up to |x| = 5.6, beyond which it is 0 or 1; 2e-7 in fp32, less than 0.5 (1 + erf) is off.
NIMFAST_HD Floats gelu(Floats x, Floats& slope) {
  const Floats most = all_lanes(5.6f), zero = all_lanes(0.0f);
  const Floats above = x < -most ? -most : x, s = above > most ? most : above;  // NaN stays
  const Floats t = s * s;
  Floats top = madd(t, all_lanes(0x1.7c7394p-26f), all_lanes(0x1.aa93ccp-18f));
  top = madd(top, t, all_lanes(0x1.6c96f4p-13f));
  top = madd(top, t, all_lanes(0x1.347eap-8f));
  top = madd(top, t, all_lanes(0x1.199bd2p-5f));
  top = madd(top, t, all_lanes(0x1.98845p-2f));
  Floats bottom = madd(t, all_lanes(0x1.3ccf2p-20f), all_lanes(0x1.3aff9ep-14f));
  bottom = madd(bottom, t, all_lanes(0x1.f57982p-10f));
  bottom = madd(bottom, t, all_lanes(0x1.da2764p-6f));
  bottom = madd(bottom, t, all_lanes(0x1.02e6d8p-2f));
  bottom = madd(bottom, t, all_lanes(1.0f));
  const Floats below = x < -most ? zero : all_lanes(0.5f) + s * top / bottom;  // Phi(x)
  const Floats density = exp2_lanes(t * all_lanes(-0.7213475204f)) * all_lanes(0.3989422804f);
  slope = madd(s, x == s ? density : zero, below);
  return above * below;
}

}  // namespace
}  // namespace nimfast
