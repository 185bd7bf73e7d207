// SPDX-License-Identifier: Apache-2.0
// attention on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "attention.h"

#include <algorithm>
#include <array>
#include <limits>

#include "cpu_memory.h"
#include "cpu_ops.h"
#include "tiles.h"

namespace nimfast {
namespace {

constexpr int64_t kBlock = 4 * kRows;  // queries whose scores exist at a time

// One head's sizes in words and padded values.
template <class Format>
struct Sizes {
  explicit Sizes(const AttentionArgs& a)
      : tokens(a.tokens),
        values(a.head_size),
        depth(Format::words(values)),
        row(round_up(depth, kLanes)),
        token_depth(Format::words(tokens)),
        keys(round_up(tokens, kLanes)),
        key_row(Format::words(keys)),
        width(round_up(values, kLanes)) {}

  int64_t tokens, values;
  int64_t depth, row;     // words of a token, the same padded
  int64_t token_depth;    // words of a column of tokens
  int64_t keys, key_row;  // tokens padded, words of that many
  int64_t width;          // values padded
};

// Room for so many words each, for one item after the other.
template <size_t Count>
std::array<float*, Count> rooms(const int64_t (&words)[Count]) {
  int64_t total = 0;
  for (const int64_t each : words) total += round_up(each, kLanes);
  std::array<float*, Count> places;
  float* next = thread_scratch(total);
  for (size_t i = 0; i < Count; ++i) {
    places[i] = next;
    next += round_up(words[i], kLanes);
  }
  return places;
}

// What no item fills must still be numbers: some processors are slow with bits that only look like one.
void clear(float* from, int64_t count) { std::fill(from, from + count, 0.0f); }

// A head's tokens as rows of words.
template <class Format, class T>
void read_rows(const T* from, int64_t stride, const Sizes<Format>& n, float* to) {
  for (int64_t i = 0; i < n.tokens; ++i) Format::read(from + i * stride, n.values, to + i * n.row, n.row);
}

// The same as a matrix [row][keys], by way of `rows`. What it holds for keys above the last token is for the caller to
// leave out.
template <class Format, class T>
void read_columns(const T* from, int64_t stride, const Sizes<Format>& n, float* rows, float* to) {
  read_rows(from, stride, n, rows);
  transpose(rows, n.row, round_up(n.tokens, 4), n.row, to, n.keys);
}

template <class Format, class T>
void store_rows(const float* from, const Sizes<Format>& n, int64_t count, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) store_row(from + i * n.width, 1.0f, n.values, to + i * stride);
}

// Of rows of scores, exp(scale (score - largest)), zero above the last token: a vector at a time goes to
// write(values, row, place in it). `inverse` becomes one over their sums; `power` is scale / ln 2. In two loops, so
// that the sums of one row need not wait for those of another.
template <class Format, class Write>
NIMFAST_HD void exponentials(const float* scores, const Sizes<Format>& n, int64_t count, float power, float* inverse,
                             Write write) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const int64_t last = n.keys - kLanes;
  float shifts[kBlock];
  for (int64_t r = 0; r < count; ++r) {
    const float* row = scores + r * n.keys;
    Floats best = first_lanes(load_lanes(row + last), n.tokens - last, kNone);
    for (int64_t j = 0; j < last; j += kLanes) {
      const Floats score = load_lanes(row + j);
      best = score > best ? score : best;
    }
    shifts[r] = -power * largest_lane(best);
  }
  const Floats gain = all_lanes(power);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = scores + r * n.keys;
    const Floats shift = all_lanes(shifts[r]);
    Floats sum = first_lanes(exp2_lanes(madd(load_lanes(row + last), gain, shift)), n.tokens - last, 0.0f);
    write(sum, r, last);
    for (int64_t j = 0; j < last; j += kLanes) {
      const Floats weight = exp2_lanes(madd(load_lanes(row + j), gain, shift));
      write(weight, r, j);
      sum += weight;
    }
    inverse[r] = 1.0f / sum_of_lanes(sum);
  }
}

template <class Format, class T>
void attention_range(const AttentionArgs& a, int64_t begin, int64_t end) {
  const Sizes<Format> n(a);
  const auto [rows, queries, keys, stacked, scores, weights, mixed] =
      rooms({n.keys * n.row, n.keys * n.row, n.row * n.keys, n.token_depth * n.width, kBlock * n.keys,
             kBlock * n.key_row, kBlock * n.width});
  clear(keys, n.row * n.keys);
  float inverse[kBlock];
  const float power = a.scale * 1.44269504f;
  const int64_t all = a.heads * a.head_size;  // from queries to keys, from keys to values
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads, h = item % a.heads;
    const T* from = static_cast<const T*>(a.qkv) + b * a.batch_stride + h * a.head_size;
    T* out = static_cast<T*>(a.out) + b * n.tokens * all + h * a.head_size;
    read_rows(from, a.token_stride, n, queries);
    read_columns(from + all, a.token_stride, n, rows, keys);
    read_rows(from + 2 * all, a.token_stride, n, rows);
    const float* values = Format::stack(rows, n.row, n.tokens, n.width, stacked);
    for (int64_t i = 0; i < n.tokens; i += kBlock) {
      const int64_t count = std::min(kBlock, n.tokens - i);
      multiply<Format>({queries + i * n.row, n.row, 1, keys, n.keys, n.depth, scores, n.keys}, count, n.keys);
      float* to = weights;
      exponentials(scores, n, count, power, inverse,
                   [to, &n](Floats value, int64_t r, int64_t at) { Format::write(value, to + r * n.key_row, at); });
      multiply<Format>({weights, n.key_row, 1, values, n.width, n.token_depth, mixed, n.width}, count, n.width);
      for (int64_t r = 0; r < count; ++r) store_row(mixed + r * n.width, inverse[r], n.values, out + (i + r) * all);
    }
  }
}

// dP = dO V',  dS = scale P (dP - sum_j P dP),  dQ = dS K,  dK = dS' Q,  dV = P' dO.
template <class Format, class T>
void attention_backward_range(const AttentionArgs& a, int64_t begin, int64_t end) {
  const Sizes<Format> n(a);
  const int64_t matrix = n.keys * n.row, stack = n.token_depth * n.width;
  const int64_t square = n.tokens * n.key_row, block = kBlock * n.keys;
  const auto [queries, keys, values, slopes, keys_across, values_across, query_stack, key_stack, slope_stack, weights,
              score_slopes, stacked, scores, weight_slopes, result] =
      rooms({matrix, matrix, matrix, matrix, matrix, matrix, stack, stack, stack, square, square,
             n.token_depth * n.keys, block, block, n.tokens * n.width});
  clear(keys_across, matrix);
  clear(values_across, matrix);
  float inverse[kBlock];
  const float power = a.scale * 1.44269504f;
  const int64_t all = a.heads * a.head_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads, h = item % a.heads;
    const T* from = static_cast<const T*>(a.qkv) + b * a.batch_stride + h * a.head_size;
    const T* gradient = static_cast<const T*>(a.gradient) + b * n.tokens * all + h * a.head_size;
    T* out = static_cast<T*>(a.out) + b * n.tokens * 3 * all + h * a.head_size;
    read_rows(from, a.token_stride, n, queries);
    read_columns(from + all, a.token_stride, n, keys, keys_across);
    read_columns(from + 2 * all, a.token_stride, n, values, values_across);
    read_rows(gradient, all, n, slopes);
    const float* key_rows = Format::stack(keys, n.row, n.tokens, n.width, key_stack);
    const float* query_rows = Format::stack(queries, n.row, n.tokens, n.width, query_stack);
    const float* slope_rows = Format::stack(slopes, n.row, n.tokens, n.width, slope_stack);
    for (int64_t i = 0; i < n.tokens; i += kBlock) {
      const int64_t count = std::min(kBlock, n.tokens - i);
      multiply<Format>({queries + i * n.row, n.row, 1, keys_across, n.keys, n.depth, scores, n.keys}, count, n.keys);
      multiply<Format>({slopes + i * n.row, n.row, 1, values_across, n.keys, n.depth, weight_slopes, n.keys}, count,
                       n.keys);
      float* powers = scores;
      exponentials(scores, n, count, power, inverse,
                   [powers, &n](Floats value, int64_t r, int64_t at) { store_lanes(powers + r * n.keys + at, value); });
      for (int64_t r = 0; r < count; ++r) {
        const float *weight = scores + r * n.keys, *slope = weight_slopes + r * n.keys;
        float *weight_row = weights + (i + r) * n.key_row, *slope_row = score_slopes + (i + r) * n.key_row;
        const int64_t last = n.keys - kLanes;
        Floats sum = load_lanes(weight + last) * first_lanes(load_lanes(slope + last), n.tokens - last, 0.0f);
        for (int64_t j = 0; j < last; j += kLanes) sum = madd(load_lanes(weight + j), load_lanes(slope + j), sum);
        const Floats mean = all_lanes(inverse[r] * sum_of_lanes(sum)), share = all_lanes(inverse[r]);
        for (int64_t j = 0; j < n.keys; j += kLanes) {
          const Floats probability = load_lanes(weight + j) * share;
          const Floats change = first_lanes(load_lanes(slope + j) - mean, n.tokens - j, 0.0f);
          Format::write(probability, weight_row, j);
          Format::write(probability * change * all_lanes(a.scale), slope_row, j);
        }
      }
      multiply<Format>({score_slopes + i * n.key_row, n.key_row, 1, key_rows, n.width, n.token_depth, result, n.width},
                       count, n.width);
      store_rows(result, n, count, out + i * 3 * all, 3 * all);
    }
    const float* columns = Format::stack(score_slopes, n.key_row, n.tokens, n.keys, stacked);
    multiply<Format>({columns, 1, n.keys, query_rows, n.width, n.token_depth, result, n.width}, n.tokens, n.width);
    store_rows(result, n, n.tokens, out + all, 3 * all);
    columns = Format::stack(weights, n.key_row, n.tokens, n.keys, stacked);
    multiply<Format>({columns, 1, n.keys, slope_rows, n.width, n.token_depth, result, n.width}, n.tokens, n.width);
    store_rows(result, n, n.tokens, out + 2 * all, 3 * all);
  }
}

}  // namespace

void NIMFAST_LEVEL::attention(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return attention_range<Singles, float>(args, begin, end);
    case ScalarType::kFloat16: return attention_range<Singles, Float16>(args, begin, end);
#if defined(__AVX512BF16__)
    case ScalarType::kBFloat16: return attention_range<Pairs, BFloat16>(args, begin, end);
#else
    case ScalarType::kBFloat16: return attention_range<Singles, BFloat16>(args, begin, end);
#endif
  }
}

void NIMFAST_LEVEL::attention_backward(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return attention_backward_range<Singles, float>(args, begin, end);
    case ScalarType::kFloat16: return attention_backward_range<Singles, Float16>(args, begin, end);
#if defined(__AVX512BF16__)
    case ScalarType::kBFloat16: return attention_backward_range<Pairs, BFloat16>(args, begin, end);
#else
    case ScalarType::kBFloat16: return attention_backward_range<Singles, BFloat16>(args, begin, end);
#endif
  }
}

}  // namespace nimfast
