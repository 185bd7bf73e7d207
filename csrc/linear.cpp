// SPDX-License-Identifier: Apache-2.0
// Linear layers on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "linear.h"

#include <algorithm>

#include "cpu_memory.h"
#include "cpu_ops.h"
#include "rows.h"
#include "tiles.h"

namespace nimfast {
namespace {

#if defined(__AVX512BF16__)
using Format = Pairs;
#else
using Format = Singles;
#endif

constexpr int64_t kPanel = kColumns * kLanes;

// gelu(x) = x Phi(x), and its derivative Phi(x) + x phi(x). The normal tail is a polynomial in 1 / (1 + p |x|) times
// exp(-x^2 / 2) (Hastings, 1955, sheet 43; 1.5e-7 in erf).
Floats gelu(Floats x, Floats& slope) {
  const Floats zero = all_lanes(0.0f);
  Floats size = x < zero ? -x : x;
  size = size < all_lanes(12.0f) ? size : all_lanes(12.0f);  // beyond, the tail would become subnormal and slow
  const Floats t = all_lanes(1.0f) / madd(size, all_lanes(0.23164189f), all_lanes(1.0f));
  Floats tail = madd(t, all_lanes(0.5307027145f), all_lanes(-0.7265760135f));
  tail = madd(tail, t, all_lanes(0.7107068705f));
  tail = madd(tail, t, all_lanes(-0.142248368f));
  tail = madd(tail, t, all_lanes(0.127414796f));
  const Floats power = exp2_lanes(size * size * all_lanes(-0.7213475204f));  // exp(-x^2 / 2)
  tail = tail * t * power;
  const Floats below = x < zero ? tail : all_lanes(1.0f) - tail;
  slope = madd(x * all_lanes(0.3989422804f), power, below);
  return x * below;
}

// Calls finish(row, column, sums) for every vector of rows [first, last) of x w.
template <class Finish>
NIMFAST_HD void multiply_rows(const LinearArgs& a, int64_t first, int64_t last, Finish finish) {
  const auto* x = static_cast<const BFloat16*>(a.x);
  const int64_t words = Format::words(a.depth);
  float* room = std::is_same_v<Format, Singles> ? thread_scratch(kRows * a.depth) : nullptr;
  alignas(64) float sums[kRows * kPanel];
  for (int64_t column = 0; column < a.width; column += kPanel) {
    const int64_t panel = std::min(kPanel, a.width - column);
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - row);
      const float* left = reinterpret_cast<const float*>(x + row * a.depth);  // pairs lie there as they are read
      if constexpr (std::is_same_v<Format, Singles>) {
        for (int64_t r = 0; r < rows; ++r) Format::read(x + (row + r) * a.depth, a.depth, room + r * words, words);
        left = room;
      }
      tile_of<Format>(rows, panel / kLanes, {left, words, 1, a.weight + column * words, panel, words, sums, kPanel});
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < panel; i += kLanes) {
          finish(row + r, column + i, load_lanes(sums + r * kPanel + i));
        }
      }
    }
  }
}

// Asks for values of the next block, a few at each tile of this one, into the second cache: 3% of the time.
void ask(const BFloat16* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) __builtin_prefetch(from + i, 0, 2);
}

// `count` rows of `width` values, each `stride` after the one before, stacked to words.
const float* stacked(const BFloat16* from, int64_t stride, int64_t count, int64_t width, float* out) {
#if defined(__AVX512BF16__)
  return Pairs::stack(reinterpret_cast<const float*>(from), stride / 2, count, width, out);
#else
  for (int64_t i = 0; i < count; ++i) Singles::read(from + i * stride, width, out + i * width, width);
  return out;
#endif
}

// Rounded to bfloat16, whatever the words hold.
Floats rounded(Floats value) {
  BFloat16 halves[kLanes];
  store_lanes(halves, value);
  return load_lanes(halves);
}

}  // namespace

void NIMFAST_LEVEL::pack(const PackArgs& a, int64_t begin, int64_t end) {
  alignas(64) float rows[PackArgs::kDepth * kPanel], stack[PackArgs::kDepth * kPanel];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * PackArgs::kDepth, depth = std::min(PackArgs::kDepth, a.depth - first);
    for (int64_t column = 0; column < a.width; column += kPanel) {
      const int64_t panel = std::min(kPanel, a.width - column);
      float* out = a.out + column * Format::words(a.depth) + Format::words(first) * panel;
      if (a.across) {
        for (int64_t k = 0; k < depth; ++k) {
          const float* from = a.weight + (first + k) * a.width + column;
          for (int64_t i = 0; i < panel; i += kLanes) {
            Format::write(rounded(load_lanes(from + i)), rows + k * Format::words(panel), i);
          }
        }
        const float* words = Format::stack(rows, Format::words(panel), depth, panel, stack);
        std::copy(words, words + Format::words(depth) * panel, out);
      } else {
        for (int64_t j = 0; j < panel; ++j) {
          const float* from = a.weight + (column + j) * a.depth + first;
          for (int64_t i = 0; i < depth; i += kLanes) {
            Format::write(rounded(load_lanes(from + i)), rows + j * Format::words(depth), i);
          }
        }
        transpose(rows, Format::words(depth), panel, Format::words(depth), out, panel);
      }
    }
  }
}

void NIMFAST_LEVEL::linear(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t first = begin * a.kRowsOfItem, last = std::min(end * a.kRowsOfItem, a.rows);
  const auto shifted = [&a](int64_t column, Floats sum) { return a.bias ? sum + load_lanes(a.bias + column) : sum; };
  auto *out = static_cast<BFloat16*>(a.out), *slopes = static_cast<BFloat16*>(a.slope);
  const auto* factors = static_cast<const BFloat16*>(a.other);
  switch (a.after) {
    case After::kNothing:
      return multiply_rows(a, first, last, [&](int64_t row, int64_t column, Floats sum) {
        store_lanes(out + row * a.width + column, shifted(column, sum));
      });
    case After::kGelu:
      return multiply_rows(a, first, last, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = row * a.width + column;
        Floats slope;
        store_lanes(out + at, gelu(shifted(column, sum), slope));
        store_lanes(slopes + at, slope);
      });
    case After::kTimes:
      return multiply_rows(a, first, last, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = row * a.width + column;
        store_lanes(out + at, sum * load_lanes(factors + at));
      });
    case After::kAdd:
      return multiply_rows(a, first, last, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = place_of(row, a.kept, a.tokens) * a.width + column;
        const Floats other = load_lanes(static_cast<const float*>(a.other) + at);
        store_lanes(static_cast<float*>(a.out) + at, madd(shifted(column, sum), all_lanes(a.gain), other));
      });
  }
}

void NIMFAST_LEVEL::weight_gradient(const WeightGradientArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 256;  // rows at a time
  constexpr int64_t kWidth = WeightGradientArgs::kWidth, kDepth = WeightGradientArgs::kDepth;
  const auto* gradient = static_cast<const BFloat16*>(a.gradient);
  const auto* x = static_cast<const BFloat16*>(a.x);
  float* room = thread_scratch(kBlock * (kWidth + kDepth));
  const Floats ones = reinterpret_cast<Floats>(Ints{} + (Format::words(2) == 1 ? 0x3f803f80 : 0x3f800000));
  alignas(64) float sums[kRows * kPanel];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t top = item / a.items_of_row() * kWidth, from = item % a.items_of_row() * kDepth;
    const int64_t width = std::min(kWidth, a.width - top), depth = std::min(kDepth, a.depth - from);
    float* weight = a.weight + top * a.depth + from;
    for (int64_t row = 0; row < a.rows; row += kBlock) {
      const int64_t rows = std::min(kBlock, a.rows - row), words = Format::words(rows);
      const float* left = stacked(gradient + row * a.width + top, a.width, rows, width, room);
      const float* right = stacked(x + row * a.depth + from, a.depth, rows, depth, room + kBlock * kWidth);
      const int64_t rows_after = std::min(kBlock, a.rows - row - rows);
      const int64_t tiles = (depth + kPanel - 1) / kPanel * ((width + kRows - 1) / kRows);
      int64_t tile = 0, asked = 0;
      for (int64_t column = 0; column < depth; column += kPanel) {
        const int64_t panel = std::min(kPanel, depth - column);
        for (int64_t i = 0; i < width; i += kRows) {
          const int64_t count = std::min<int64_t>(kRows, width - i);
          for (++tile; asked < rows_after * tile / tiles; ++asked) {
            ask(gradient + (row + rows + asked) * a.width + top, width);
            ask(x + (row + rows + asked) * a.depth + from, depth);
          }
          tile_of<Format>(count, panel / kLanes, {left + i, 1, width, right + column, depth, words, sums, kPanel});
          for (int64_t r = 0; r < count; ++r) {
            float* to = weight + (i + r) * a.depth + column;
            for (int64_t j = 0; j < panel; j += kLanes) {
              const Floats sum = load_lanes(sums + r * kPanel + j);
              store_lanes(to + j, row ? load_lanes(to + j) + sum : sum);
            }
          }
        }
      }
      if (from) continue;
      for (int64_t i = 0; i < width; i += kLanes) {
        Floats sum = row ? load_lanes(a.bias + top + i) : all_lanes(0.0f);
        for (int64_t k = 0; k < words; ++k) sum = Format::madd(load_lanes(left + k * width + i), ones, sum);
        store_lanes(a.bias + top + i, sum);
      }
    }
  }
}

}  // namespace nimfast
