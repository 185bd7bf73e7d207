// SPDX-License-Identifier: Apache-2.0
// Linear layers on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "linear.h"

#include <algorithm>

#include "cpu_memory.h"
#include "cpu_ops.h"
#include "products.h"
#include "rows.h"

namespace nimfast {
namespace {

using Format = FormatOf<BFloat16>;

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

// Rounded to T, whatever the words hold.
template <class T>
Floats rounded(Floats value) {
  T values[kLanes];
  store_lanes(values, value);
  return load_lanes(values);
}

template <class T>
void pack_range(const PackArgs& a, int64_t begin, int64_t end) {
  using Format = FormatOf<T>;
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
            Format::write(rounded<T>(load_lanes(from + i)), rows + k * Format::words(panel), i);
          }
        }
        const float* words = Format::stack(rows, Format::words(panel), depth, panel, stack);
        std::copy(words, words + Format::words(depth) * panel, out);
      } else {
        for (int64_t j = 0; j < panel; ++j) {
          const float* from = a.weight + (column + j) * a.depth + first;
          for (int64_t i = 0; i < depth; i += kLanes) {
            Format::write(rounded<T>(load_lanes(from + i)), rows + j * Format::words(depth), i);
          }
        }
        transpose(rows, Format::words(depth), panel, Format::words(depth), out, panel);
      }
    }
  }
}

// out = x w + bias of rows [first, first + rows).
template <class T>
void multiply(const LinearArgs& a, int64_t first, int64_t rows) {
  const T* x = static_cast<const T*>(a.x) + first * a.depth;
  T* out = static_cast<T*>(a.out) + first * a.width;
  const float* bias = a.bias;
  const int64_t width = a.width;
  multiply_rows(x, a.depth, rows, {a.weight, a.depth, width}, [=](int64_t row, int64_t column, Floats sum) {
    store_some(out + row * width + column, bias ? sum + load_lanes(bias + column) : sum, width - column);
  });
}

}  // namespace

void NIMFAST_LEVEL::pack(const PackArgs& a, int64_t begin, int64_t end) {
  if (a.type == ScalarType::kFloat32) return pack_range<float>(a, begin, end);
  pack_range<BFloat16>(a, begin, end);
}

void NIMFAST_LEVEL::linear(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t first = begin * a.kRowsOfItem, rows = std::min(end * a.kRowsOfItem, a.rows) - first;
  const int64_t skipped = first * a.width;
  const auto* x = static_cast<const BFloat16*>(a.x) + first * a.depth;
  const Packed weight{a.weight, a.depth, a.width};
  const auto shifted = [&a](int64_t column, Floats sum) { return a.bias ? sum + load_lanes(a.bias + column) : sum; };
  switch (a.after) {
    case After::kNothing:
      if (a.type == ScalarType::kFloat32) return multiply<float>(a, first, rows);
      return multiply<BFloat16>(a, first, rows);
    case After::kGelu: {
      auto *out = static_cast<BFloat16*>(a.out) + skipped, *slopes = static_cast<BFloat16*>(a.slope) + skipped;
      return multiply_rows(x, a.depth, rows, weight, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = row * a.width + column;
        Floats slope;
        store_lanes(out + at, gelu(shifted(column, sum), slope));
        store_lanes(slopes + at, slope);
      });
    }
    case After::kTimes: {
      auto* out = static_cast<BFloat16*>(a.out) + skipped;
      const auto* factors = static_cast<const BFloat16*>(a.other) + skipped;
      return multiply_rows(x, a.depth, rows, weight, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = row * a.width + column;
        store_lanes(out + at, sum * load_lanes(factors + at));
      });
    }
    case After::kAdd: {
      auto* out = static_cast<float*>(a.out);
      const auto* others = static_cast<const float*>(a.other);
      return multiply_rows(x, a.depth, rows, weight, [&](int64_t row, int64_t column, Floats sum) {
        const int64_t at = place_of(first + row, a.kept, a.tokens) * a.width + column;
        store_lanes(out + at, madd(shifted(column, sum), all_lanes(a.gain), load_lanes(others + at)));
      });
    }
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
