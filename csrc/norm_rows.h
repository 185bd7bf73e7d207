// SPDX-License-Identifier: Apache-2.0
// Layer norm of one row, and its gradient.
#pragma once
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace nimfast {

struct RowStatistics {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

template <class T>
NIMFAST_HD RowStatistics statistics_of(const T* x, int64_t width, float eps) {
  const float share = 1.0f / static_cast<float>(width);
  Floats sum = all_lanes(0.0f), squares = sum;
  for (int64_t i = 0; i < width; i += kLanes) sum += load_some(x + i, width - i);
  const float mean = share * sum_of_lanes(sum);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats change = first_lanes(load_some(x + i, width - i) - all_lanes(mean), width - i, 0.0f);
    squares = madd(change, change, squares);
  }
  return {mean, 1.0f / std::sqrt(share * sum_of_lanes(squares) + eps)};
}

// out = (x - mean) * scale * weight + bias.
template <class T, class Out>
NIMFAST_HD RowStatistics norm_row(const T* x, const float* weight, const float* bias, float eps, int64_t width,
                                  Out* out) {
  const RowStatistics found = statistics_of(x, width, eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t left = width - i;
    const Floats normed = (load_some(x + i, left) - all_lanes(found.mean)) * all_lanes(found.scale);
    store_some(out + i, madd(normed, load_some(weight + i, left), load_some(bias + i, left)), left);
  }
  return found;
}

// From the gradient of a row that norm_row wrote: out(place, vector) gets that of x. also(place, gradient, normed) is
// called with every vector before.
template <class T, class X, class Also, class Out>
NIMFAST_HD void norm_row_backward(const T* gradient, const X* x, const RowStatistics& found, const float* weight,
                                  int64_t width, Also also, Out out) {
  const float share = 1.0f / static_cast<float>(width);
  const Floats mean = all_lanes(found.mean), scale = all_lanes(found.scale);
  Floats sum = all_lanes(0.0f), product = sum;
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t left = width - i;
    const Floats slope = load_some(gradient + i, left), normed = (load_some(x + i, left) - mean) * scale;
    const Floats weighed = slope * load_some(weight + i, left);
    sum += weighed;
    product = madd(weighed, normed, product);
    also(i, slope, normed);
  }
  const Floats level = all_lanes(share * sum_of_lanes(sum)), along = all_lanes(share * sum_of_lanes(product));
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t left = width - i;
    const Floats normed = (load_some(x + i, left) - mean) * scale;
    out(i, (load_some(gradient + i, left) * load_some(weight + i, left) - level - normed * along) * scale);
  }
}

}  // namespace nimfast
