// SPDX-License-Identifier: Apache-2.0
// Linear layers in training: rows of bfloat16 in and out, weights and sums in fp32, and what follows a product done
// while its sums are in registers or the first cache. Weights are rounded to bfloat16 as autocast rounds them, when
// they are laid out for the products. Every width and depth is a multiple of 16.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

// A matrix in the layout that products read: panels of neighbouring columns, word by word along the sum (products.h),
// for rows of `type`, float32 or bfloat16, to which it is rounded.
struct PackArgs {
  static constexpr int64_t kDepth = 32;  // of an item

  const float* weight;  // [width, depth], or [depth, width] where `across`
  float* out;           // room for depth * width floats
  int64_t depth;        // values that are multiplied and added
  int64_t width;        // values of a result
  bool across;
  ScalarType type;

  int64_t items() const { return (depth + kDepth - 1) / kDepth; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / (kDepth * width); }
};

enum class After : int {  // the codes that Python passes
  kNothing = 0,           // out = x w + bias, of any even depth and any width
  kGelu = 1,              // out = gelu(x w + bias), and its derivative there
  kTimes = 2,             // out = (x w) * other
  kAdd = 3,               // out = other + gain * (x w + bias) in fp32
};

struct LinearArgs {
  static constexpr int64_t kRowsOfItem = 6;

  ScalarType type;      // of x and out, bfloat16; kNothing: or float32
  const void* x;        // [rows, depth]
  const float* weight;  // from `pack`, on the same instruction set
  const float* bias;    // [width], filled up to a multiple of 16; or null
  After after;
  const void* other;    // kTimes: bfloat16 [rows, width]; kAdd: fp32, as out
  void* out;            // [rows, width]; kAdd: fp32
  void* slope;          // kGelu: bfloat16 [rows, width]
  const int64_t* kept;  // kAdd: the images of x among those of other and out (rows.h)
  int64_t tokens;
  float gain;
  int64_t rows, depth, width;

  int64_t items() const { return (rows + kRowsOfItem - 1) / kRowsOfItem; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 20) / (kRowsOfItem * depth * width); }
};

// gradient' x and the sums of gradient's columns: the gradients of a weight and its bias. Each is one sum over the rows
// in a fixed order.
struct WeightGradientArgs {
  static constexpr int64_t kWidth = 96, kDepth = 192;  // of an item

  const void* gradient;  // bfloat16 [rows, width]
  const void* x;         // bfloat16 [rows, depth]
  float* weight;         // [width, depth]
  float* bias;           // [width]
  int64_t rows, depth, width;

  int64_t items_of_row() const { return (depth + kDepth - 1) / kDepth; }
  int64_t items() const { return (width + kWidth - 1) / kWidth * items_of_row(); }
  int64_t items_worth_a_thread() const { return 1 + (1 << 20) / ((1 + rows) * kWidth * kDepth); }
};

}  // namespace nimfast
