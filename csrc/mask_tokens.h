// SPDX-License-Identifier: Apache-2.0
// mask_tokens: tokens with the masked ones replaced by one learned token, and its gradient.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

struct MaskTokensArgs {
  const void* tokens;      // [N * L, D], contiguous
  const void* mask_token;  // [D], of the same type
  const uint8_t* mask;     // [N * L], 1 = masked
  void* out;               // [N * L, D]
  int64_t rows;            // N * L
  int64_t columns;         // D
  ScalarType type;

  int64_t items() const { return rows; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 15) / columns; }
};

// out = 0 at the masked rows, gradient at the others; partial[p] = sum of the masked rows of part p. The parts do not
// depend on the number of threads, so neither does the sum.
struct MaskTokensBackwardArgs {
  const void* gradient;  // [N * L, D], contiguous
  const uint8_t* mask;   // [N * L]
  void* out;             // [N * L, D]
  float* partial;        // [ceil(N * L / rows_per_part), D]
  int64_t rows;          // N * L
  int64_t rows_per_part;
  int64_t columns;  // D
  ScalarType type;

  int64_t items() const { return (rows + rows_per_part - 1) / rows_per_part; }  // parts
  int64_t items_worth_a_thread() const { return 1 + (1 << 15) / (rows_per_part * columns); }
};

}  // namespace nimfast
