// SPDX-License-Identifier: Apache-2.0
// What stands between the residual sums of a network, in fp32, and its products, in bfloat16: layer norm, its gradient,
// and the gradient of a branch's result. The images `kept` take part (rows.h).
// The width is a multiple of 16.
#pragma once
#include <cstdint>

namespace nimfast {

// out = bfloat16(gain * x).
struct TakeRowsArgs {
  const int64_t* kept;
  int64_t tokens;
  const float* x;
  float gain;
  void* out;  // bfloat16 [rows, width]
  int64_t rows, width;

  int64_t items() const { return rows; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / width; }
};

// out = (x - mean) * scale * weight + bias, scale being 1 / sqrt(variance + eps).
struct LayerNormArgs {
  const int64_t* kept;
  int64_t tokens;
  const float *x, *weight, *bias;
  float eps;
  void* out;              // bfloat16 [rows, width]
  float *means, *scales;  // [rows]
  int64_t rows, width;

  int64_t items() const { return rows; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / width; }
};

// out = residual + the gradient of x, in the rows that took part. Sums for weight and bias are those of fixed parts.
struct LayerNormBackwardArgs {
  static constexpr int64_t kRowsOfPart = 64;

  const int64_t* kept;
  int64_t tokens;
  const void* gradient;  // of the result, bfloat16 [rows, width]
  const float *x, *weight, *means, *scales;
  const float* residual;
  float* out;
  float* sums;  // [items][2][width]: of weight, of bias
  int64_t rows, width;

  int64_t items() const { return (rows + kRowsOfPart - 1) / kRowsOfPart; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / (kRowsOfPart * width); }
};

}  // namespace nimfast
