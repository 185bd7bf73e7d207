// SPDX-License-Identifier: Apache-2.0
// Layer norm on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "layer_norm.h"

#include <algorithm>
#include <cmath>

#include "cpu_ops.h"
#include "rows.h"
#include "simd.h"

namespace nimfast {

void NIMFAST_LEVEL::take_rows(const TakeRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + place_of(row, a.kept, a.tokens) * a.width;
    auto* out = static_cast<BFloat16*>(a.out) + row * a.width;
    for (int64_t i = 0; i < a.width; i += kLanes) store_lanes(out + i, load_lanes(x + i) * all_lanes(a.gain));
  }
}

void NIMFAST_LEVEL::layer_norm(const LayerNormArgs& a, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(a.width);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + place_of(row, a.kept, a.tokens) * a.width;
    auto* out = static_cast<BFloat16*>(a.out) + row * a.width;
    Floats sum = all_lanes(0.0f), squares = sum;
    for (int64_t i = 0; i < a.width; i += kLanes) sum += load_lanes(x + i);
    const float mean = share * sum_of_lanes(sum);
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const Floats change = load_lanes(x + i) - all_lanes(mean);
      squares = madd(change, change, squares);
    }
    const float scale = 1.0f / std::sqrt(share * sum_of_lanes(squares) + a.eps);
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const Floats normed = (load_lanes(x + i) - all_lanes(mean)) * all_lanes(scale);
      store_lanes(out + i, madd(normed, load_lanes(a.weight + i), load_lanes(a.bias + i)));
    }
    a.means[row] = mean;
    a.scales[row] = scale;
  }
}

void NIMFAST_LEVEL::layer_norm_backward(const LayerNormBackwardArgs& a, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(a.width);
  for (int64_t part = begin; part < end; ++part) {
    float *of_weight = a.sums + 2 * part * a.width, *of_bias = of_weight + a.width;
    std::fill(of_weight, of_weight + 2 * a.width, 0.0f);
    for (int64_t row = part * a.kRowsOfPart; row < std::min((part + 1) * a.kRowsOfPart, a.rows); ++row) {
      const int64_t place = place_of(row, a.kept, a.tokens) * a.width;
      const auto* gradient = static_cast<const BFloat16*>(a.gradient) + row * a.width;
      const Floats mean = all_lanes(a.means[row]), scale = all_lanes(a.scales[row]);
      Floats sum = all_lanes(0.0f), product = sum;
      for (int64_t i = 0; i < a.width; i += kLanes) {
        const Floats slope = load_lanes(gradient + i), normed = (load_lanes(a.x + place + i) - mean) * scale;
        const Floats weighed = slope * load_lanes(a.weight + i);
        sum += weighed;
        product = madd(weighed, normed, product);
        store_lanes(of_weight + i, madd(slope, normed, load_lanes(of_weight + i)));
        store_lanes(of_bias + i, load_lanes(of_bias + i) + slope);
      }
      const Floats level = all_lanes(share * sum_of_lanes(sum)), along = all_lanes(share * sum_of_lanes(product));
      for (int64_t i = 0; i < a.width; i += kLanes) {
        const Floats normed = (load_lanes(a.x + place + i) - mean) * scale;
        const Floats change = load_lanes(gradient + i) * load_lanes(a.weight + i) - level - normed * along;
        store_lanes(a.out + place + i, madd(change, scale, load_lanes(a.residual + place + i)));
      }
    }
  }
}

}  // namespace nimfast
