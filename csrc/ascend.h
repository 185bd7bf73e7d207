// SPDX-License-Identifier: Apache-2.0
// ascend: the next iterate of a gradient attack.
//   z = project(x + step[n] * d),  d = sign(gradient) or gradient / (||gradient||_2 + 1e-12)
//   next = z, or with the point before x: project(x + momentum (z - x) + rest (x - previous))
// project: onto the ball of radius eps[n] around origin, then onto the box [0, 1].
// There is no CUDA C++ of it: a loop over memory without shared state, for which Triton's code is as good.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct AscendArgs {
  const float* x;         // [N, D]
  const float* origin;    // [N, D]
  const void* gradient;   // [N, D]
  const float* previous;  // [N, D], or null
  const float* step;      // [N]
  const float* eps;       // [N]
  float* out;             // [N, D]
  int64_t images;         // N
  int64_t values;         // D
  float momentum;
  float rest;  // 1 - momentum, rounded once
  bool l2;
  ScalarType type;  // of the gradient

  static constexpr int64_t kChunk = 1024;  // values
  int64_t chunks_of_image() const { return (values + kChunk - 1) / kChunk; }
  // l_inf: chunks. l2: whole images, whose norms every value waits for.
  int64_t items() const { return l2 ? images : images * chunks_of_image(); }
  int64_t items_worth_a_thread() const { return l2 ? 1 + 16 * kChunk / values : 16; }
};

}  // namespace nimfast
