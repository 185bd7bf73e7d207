// SPDX-License-Identifier: Apache-2.0
// Layer norm on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "layer_norm.h"

#include <algorithm>

#include "cpu_ops.h"
#include "norm_rows.h"
#include "rows.h"

namespace nimfast {

void NIMFAST_LEVEL::take_rows(const TakeRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + place_of(row, a.kept, a.tokens) * a.width;
    auto* out = static_cast<BFloat16*>(a.out) + row * a.width;
    for (int64_t i = 0; i < a.width; i += kLanes) store_lanes(out + i, load_lanes(x + i) * all_lanes(a.gain));
  }
}

void NIMFAST_LEVEL::layer_norm(const LayerNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + place_of(row, a.kept, a.tokens) * a.width;
    auto* out = static_cast<BFloat16*>(a.out) + row * a.width;
    const RowStatistics found = norm_row(x, a.weight, a.bias, a.eps, a.width, out);
    a.means[row] = found.mean;
    a.scales[row] = found.scale;
  }
}

void NIMFAST_LEVEL::layer_norm_backward(const LayerNormBackwardArgs& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    float *of_weight = a.sums + 2 * part * a.width, *of_bias = of_weight + a.width;
    std::fill(of_weight, of_weight + 2 * a.width, 0.0f);
    for (int64_t row = part * a.kRowsOfPart; row < std::min((part + 1) * a.kRowsOfPart, a.rows); ++row) {
      const int64_t place = place_of(row, a.kept, a.tokens) * a.width;
      norm_row_backward(
          static_cast<const BFloat16*>(a.gradient) + row * a.width, a.x + place, {a.means[row], a.scales[row]},
          a.weight, a.width,
          [&](int64_t i, Floats slope, Floats normed) {
            store_lanes(of_weight + i, madd(slope, normed, load_lanes(of_weight + i)));
            store_lanes(of_bias + i, load_lanes(of_bias + i) + slope);
          },
          [&](int64_t i, Floats change) {
            store_lanes(a.out + place + i, load_lanes(a.residual + place + i) + change);
          });
    }
  }
}

}  // namespace nimfast
