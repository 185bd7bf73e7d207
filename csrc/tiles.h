// SPDX-License-Identifier: Apache-2.0
// Products of small matrices that lie in the cache, and the layouts that they read. Included once by every file that
// multiplies; all of it is that file's own, for it differs between instruction sets.
//
// A word is 32 bits: one float, or two bfloat16 values next to each other along the sum, which a processor with
// AVX512_BF16 multiplies and adds at once. In both cases a product is
//   c[i][j] = sum over words k of  a[i][k] . b[k][j],
// with one word of `a` in every lane and a vector of words of `b`. A matrix that holds values in rows is therefore read
//   as `a` along its rows                        (Format::read),
//   as `b` from its transpose, word by word      (transpose), or
//   as `b` from its rows, stacked to words       (Format::stack).
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace nimfast {
namespace {

// Sums held in registers: 24 of AVX-512's 32, 12 or 8 of the 16 that others have.
#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kRows = 4, kColumns = 3;
#else
constexpr int kRows = 4, kColumns = 2;  // without fused operations, products take registers too
#endif

constexpr int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

struct Product {
  const float* a;
  int64_t a_row, a_step;  // words from one row to the next, from one k to the next
  const float* b;
  int64_t b_step;  // words from one k to the next
  int64_t depth;   // number of k
  float* c;
  int64_t c_row;
};

template <class Format, int R, int C>
void tile(const Product& p) {
  Floats sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int x = 0; x < C; ++x) sums[r][x] = all_lanes(0.0f);
  }
  const float *a = p.a, *b = p.b;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step) {
    Floats right[C];
#pragma GCC unroll 8
    for (int x = 0; x < C; ++x) right[x] = load_lanes(b + x * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats left = all_lanes(a[r * p.a_row]);
#pragma GCC unroll 8
      for (int x = 0; x < C; ++x) sums[r][x] = Format::madd(left, right[x], sums[r][x]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int x = 0; x < C; ++x) store_lanes(p.c + r * p.c_row + x * kLanes, sums[r][x]);
  }
}

template <class Format, int R = kRows, int C = kColumns>
void tile_of(int64_t rows, int64_t columns, const Product& p) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<Format, R - 1, C>(rows, columns, p);
  }
  if constexpr (C > 1) {
    if (columns < C) return tile_of<Format, R, C - 1>(rows, columns, p);
  }
  tile<Format, R, C>(p);
}

// `rows` rows of `width` values (a multiple of kLanes). The last two tiles of a row are about equally wide: a narrow
// one waits for its own sums.
template <class Format>
void multiply(const Product& p, int64_t rows, int64_t width) {
  for (int64_t first = 0, left = width / kLanes; left > 0;) {
    const int64_t columns = left >= 2 * kColumns ? kColumns : left > kColumns ? (left + 1) / 2 : left;
    Product part = p;
    part.b += first;
    for (int64_t r = 0; r < rows; r += kRows) {
      part.a = p.a + r * p.a_row;
      part.c = p.c + r * p.c_row + first;
      tile_of<Format>(rows - r, columns, part);
    }
    first += columns * kLanes;
    left -= columns;
  }
}

// out[k][i] = rows[i][k], for multiples of 4.
[[maybe_unused]] void transpose(const float* rows, int64_t row, int64_t count, int64_t words, float* out,
                                int64_t out_row) {
  for (int64_t i = 0; i < count; i += 4) {
    const float* from = rows + i * row;
    for (int64_t k = 0; k < words; k += 4) {
#if defined(__SSE__)
      __m128 v0 = _mm_loadu_ps(from + k), v1 = _mm_loadu_ps(from + row + k);
      __m128 v2 = _mm_loadu_ps(from + 2 * row + k), v3 = _mm_loadu_ps(from + 3 * row + k);
      _MM_TRANSPOSE4_PS(v0, v1, v2, v3);
      float* to = out + k * out_row + i;
      _mm_storeu_ps(to, v0);
      _mm_storeu_ps(to + out_row, v1);
      _mm_storeu_ps(to + 2 * out_row, v2);
      _mm_storeu_ps(to + 3 * out_row, v3);
#else
      for (int64_t j = 0; j < 4; ++j) {
        for (int64_t m = 0; m < 4; ++m)
          std::memcpy(out + (k + m) * out_row + i + j, from + j * row + k + m, sizeof(float));
      }
#endif
    }
  }
}

// One float per word.
struct Singles {
  static int64_t words(int64_t values) { return values; }
  static NIMFAST_HD Floats madd(Floats a, Floats b, Floats c) { return nimfast::madd(a, b, c); }

  // A row of `values` values, followed by zeros up to `row` words.
  template <class T>
  static NIMFAST_HD void read(const T* from, int64_t values, float* to, int64_t row) {
    int64_t i = 0;
    for (; i + kLanes <= values; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) to[i + j] = load(from[i + j]);
    }
    for (; i < row; ++i) to[i] = i < values ? load(from[i]) : 0.0f;
  }

  // Rows of `width` values as words along the columns: the same rows.
  static const float* stack(const float* rows, int64_t, int64_t, int64_t, float*) { return rows; }

  // A vector of results as a later product reads them, where row `to` has its value `at`.
  static NIMFAST_HD void write(Floats value, float* to, int64_t at) { store_lanes(to + at, value); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 values per word.
struct Pairs {
  typedef uint16_t Half __attribute__((may_alias));

  static int64_t words(int64_t values) { return (values + 1) / 2; }

  static NIMFAST_HD Floats madd(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static NIMFAST_HD void read(const BFloat16* from, int64_t values, float* to, int64_t row) {
    for (int64_t i = 0; i < row; i += kLanes) {
      const int64_t left = values - 2 * i;
      const __mmask32 some = left >= 32 ? ~__mmask32{0} : left > 0 ? (__mmask32{1} << left) - 1 : 0;
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(some, from + 2 * i));
    }
  }

  // Values of two rows that lie above each other in one word, and zero below an odd last one: [words(count)][width].
  static const float* stack(const float* rows, int64_t row, int64_t count, int64_t width, float* out) {
    const auto* halves = reinterpret_cast<const Half*>(rows);
    for (int64_t i = 0; i < count; i += 2) {
      const Half *upper = halves + 2 * i * row, *lower = upper + 2 * row;
      float* to = out + i / 2 * width;
      if (i + 1 < count) {
        for (int64_t x = 0; x < width; ++x) to[x] = float_of(upper[x] | static_cast<uint32_t>(lower[x]) << 16);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = float_of(upper[x]);
      }
    }
    return out;
  }

  static NIMFAST_HD void write(Floats value, float* to, int64_t at) {
    const __m256bh halves = _mm512_cvtneps_pbh(value);
    std::memcpy(reinterpret_cast<uint8_t*>(to) + at * sizeof(BFloat16), &halves, sizeof(halves));
  }
};
#endif

}  // namespace
}  // namespace nimfast
