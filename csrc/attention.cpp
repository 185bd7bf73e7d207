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

// A head's tokens as rows of words, with rows of zeros up to `keys`.
template <class Format, class T>
void read_rows(const T* from, int64_t stride, const Sizes<Format>& n, float* to) {
  for (int64_t i = 0; i < n.tokens; ++i) Format::read(from + i * stride, n.values, to + i * n.row, n.row);
  std::fill(to + n.tokens * n.row, to + n.keys * n.row, 0.0f);
}

template <class Format, class T>
void store_rows(const float* from, const Sizes<Format>& n, int64_t count, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) store_row(from + i * n.width, 1.0f, n.values, to + i * stride);
}

// A row of scores becomes exp(scale (score - largest)); the result is one over their sum. `power` is scale / ln 2.
// What is above the last token becomes next to nothing.
template <class Format>
float softmax(float* scores, const Sizes<Format>& n, float power) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::fill(scores + n.tokens, scores + n.keys, kNone);
  Floats best = load_lanes(scores);
  for (int64_t j = kLanes; j < n.keys; j += kLanes) {
    const Floats score = load_lanes(scores + j);
    best = score > best ? score : best;
  }
  const Floats gain = all_lanes(power), shift = all_lanes(-power * largest_lane(best));
  Floats sum = all_lanes(0.0f);
  for (int64_t j = 0; j < n.keys; j += kLanes) {
    const Floats weight = exp2_lanes(madd(load_lanes(scores + j), gain, shift));
    store_lanes(scores + j, weight);
    sum += weight;
  }
  return 1.0f / sum_of_lanes(sum);
}

template <class Format, class T>
void attention_range(const AttentionArgs& a, int64_t begin, int64_t end) {
  const Sizes<Format> n(a);
  const auto [rows, queries, keys, stacked, scores, weights, mixed] =
      rooms({n.keys * n.row, n.keys * n.row, n.row * n.keys, n.token_depth * n.width, kBlock * n.keys,
             kBlock * n.key_row, kBlock * n.width});
  float inverse[kBlock];
  const float power = a.scale * 1.44269504f;
  const int64_t all = a.heads * a.head_size;  // from queries to keys, from keys to values
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads, h = item % a.heads;
    const T* from = static_cast<const T*>(a.qkv) + b * a.batch_stride + h * a.head_size;
    T* out = static_cast<T*>(a.out) + b * n.tokens * all + h * a.head_size;
    read_rows(from, a.token_stride, n, queries);
    read_rows(from + all, a.token_stride, n, rows);
    transpose(rows, n.row, n.keys, n.row, keys, n.keys);
    read_rows(from + 2 * all, a.token_stride, n, rows);
    const float* values = Format::stack(rows, n.row, n.tokens, n.width, stacked);
    for (int64_t i = 0; i < n.tokens; i += kBlock) {
      const int64_t count = std::min(kBlock, n.tokens - i);
      multiply<Format>({queries + i * n.row, n.row, 1, keys, n.keys, n.depth, scores, n.keys}, count, n.keys);
      for (int64_t r = 0; r < count; ++r) {
        inverse[r] = softmax(scores + r * n.keys, n, power);
        Format::write(scores + r * n.keys, 1.0f, n.keys, weights + r * n.key_row);
      }
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
  const float power = a.scale * 1.44269504f;
  const int64_t all = a.heads * a.head_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads, h = item % a.heads;
    const T* from = static_cast<const T*>(a.qkv) + b * a.batch_stride + h * a.head_size;
    const T* gradient = static_cast<const T*>(a.gradient) + b * n.tokens * all + h * a.head_size;
    T* out = static_cast<T*>(a.out) + b * n.tokens * 3 * all + h * a.head_size;
    read_rows(from, a.token_stride, n, queries);
    read_rows(from + all, a.token_stride, n, keys);
    read_rows(from + 2 * all, a.token_stride, n, values);
    read_rows(gradient, all, n, slopes);
    transpose(keys, n.row, n.keys, n.row, keys_across, n.keys);
    transpose(values, n.row, n.keys, n.row, values_across, n.keys);
    const float* key_rows = Format::stack(keys, n.row, n.tokens, n.width, key_stack);
    const float* query_rows = Format::stack(queries, n.row, n.tokens, n.width, query_stack);
    const float* slope_rows = Format::stack(slopes, n.row, n.tokens, n.width, slope_stack);
    for (int64_t i = 0; i < n.tokens; i += kBlock) {
      const int64_t count = std::min(kBlock, n.tokens - i);
      multiply<Format>({queries + i * n.row, n.row, 1, keys_across, n.keys, n.depth, scores, n.keys}, count, n.keys);
      multiply<Format>({slopes + i * n.row, n.row, 1, values_across, n.keys, n.depth, weight_slopes, n.keys}, count,
                       n.keys);
      for (int64_t r = 0; r < count; ++r) {
        float *score = scores + r * n.keys, *slope = weight_slopes + r * n.keys;
        const float inverse = softmax(score, n, power);
        std::fill(score + n.tokens, score + n.keys, 0.0f);
        Floats sum = all_lanes(0.0f);
        for (int64_t j = 0; j < n.keys; j += kLanes) sum = madd(load_lanes(score + j), load_lanes(slope + j), sum);
        const Floats mean = all_lanes(inverse * sum_of_lanes(sum)), gain = all_lanes(a.scale * inverse);
        for (int64_t j = 0; j < n.keys; j += kLanes) {
          store_lanes(slope + j, load_lanes(score + j) * gain * (load_lanes(slope + j) - mean));
        }
        Format::write(score, inverse, n.keys, weights + (i + r) * n.key_row);
        Format::write(slope, 1.0f, n.keys, score_slopes + (i + r) * n.key_row);
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
