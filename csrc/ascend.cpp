// SPDX-License-Identifier: Apache-2.0
// ascend on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "ascend.h"

#include <algorithm>
#include <cmath>

#include "cpu_ops.h"
#include "inline.h"

namespace nimfast {
namespace {

constexpr int kWidth = 16;  // independent sums, so that the loops vectorise without reordering one
constexpr double kTiny = 1e-12;

// Written so that NaN passes through.
NIMFAST_HD float clip(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// --- l_inf: the same operations in the same order as the torch lines, so the same bits
// --------------------------------

template <class T, bool kMomentum>
void linf_values(const AscendArgs& a, int64_t image, int64_t begin, int64_t end) {
  const int64_t at = image * a.values;
  const float *x = a.x + at, *origin = a.origin + at, *previous = kMomentum ? a.previous + at : nullptr;
  const T* gradient = static_cast<const T*>(a.gradient) + at;
  float* out = a.out + at;
  const float step = a.step[image], eps = a.eps[image], momentum = a.momentum, rest = a.rest;
  for (int64_t i = begin; i < end; ++i) {
    const float g = load(gradient[i]), low = origin[i] - eps, high = origin[i] + eps;
    const float move = g > 0.0f ? step : (g < 0.0f ? -step : g);  // 0 stays 0, NaN stays NaN
    float y = clip(clip(x[i] + move, low, high), 0.0f, 1.0f);
    if (kMomentum) y = clip(clip(x[i] + (y - x[i]) * momentum + (x[i] - previous[i]) * rest, low, high), 0.0f, 1.0f);
    out[i] = y;
  }
}

// --- l2
// ---------------------------------------------------------------------------------------------------------------

// Sums in float over a chunk, in double over the chunks: always in the same order.
template <int kSums, class Terms>
NIMFAST_HD void add_up(int64_t values, double (&total)[kSums], Terms terms) {
  for (int64_t begin = 0; begin < values; begin += AscendArgs::kChunk) {
    const int64_t end = std::min(begin + AscendArgs::kChunk, values);
    float sums[kSums][kWidth] = {};
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      for (int j = 0; j < kWidth; ++j) {
        float term[kSums];
        terms(i + j, term);
        for (int s = 0; s < kSums; ++s) sums[s][j] += term[s];
      }
    }
    for (; i < end; ++i) {
      float term[kSums];
      terms(i, term);
      for (int s = 0; s < kSums; ++s) sums[s][0] += term[s];
    }
    for (int s = 0; s < kSums; ++s) {
      for (int j = 0; j < kWidth; ++j) total[s] += static_cast<double>(sums[s][j]);
    }
  }
}

// What brings a point at distance `norm` from the origin back into the ball. (Inside, the published
// min(eps, norm) / (norm + 1e-12) moves the point by less than 1e-12.)
inline float shrink(double norm, float eps) {
  return norm > static_cast<double>(eps) ? static_cast<float>(static_cast<double>(eps) / (norm + kTiny)) : 1.0f;
}

template <class T>
void l2_image(const AscendArgs& a, int64_t image) {
  const int64_t at = image * a.values;
  const float *x = a.x + at, *origin = a.origin + at;
  const T* gradient = static_cast<const T*>(a.gradient) + at;
  float* out = a.out + at;
  const float eps = a.eps[image];

  // ||x + gain g - origin||^2 from three sums, because the gain is known only after the first of them: one pass less.
  double sums[3] = {};  // |g|^2, <x - origin, g>, |x - origin|^2
  add_up(a.values, sums, [=](int64_t i, float (&term)[3]) {
    const float g = load(gradient[i]), away = x[i] - origin[i];
    term[0] = g * g;
    term[1] = away * g;
    term[2] = away * away;
  });
  const double gain = static_cast<double>(a.step[image]) / (std::sqrt(sums[0]) + kTiny);
  const double square = sums[2] + 2.0 * gain * sums[1] + gain * gain * sums[0];
  const float move = static_cast<float>(gain), inside = shrink(std::sqrt(square < 0.0 ? 0.0 : square), eps);
  const auto moved = [=](int64_t i) {
    return clip(origin[i] + (x[i] + load(gradient[i]) * move - origin[i]) * inside, 0.0f, 1.0f);
  };
  if (!a.previous) {
    for (int64_t i = 0; i < a.values; ++i) out[i] = moved(i);
    return;
  }

  const float *previous = a.previous + at, momentum = a.momentum, rest = a.rest;
  double squares[1] = {};
  add_up(a.values, squares, [=](int64_t i, float (&term)[1]) {
    const float y = x[i] + (moved(i) - x[i]) * momentum + (x[i] - previous[i]) * rest, away = y - origin[i];
    out[i] = y;
    term[0] = away * away;
  });
  const float again = shrink(std::sqrt(squares[0]), eps);
  for (int64_t i = 0; i < a.values; ++i) out[i] = clip(origin[i] + (out[i] - origin[i]) * again, 0.0f, 1.0f);
}

// ----------------------------------------------------------------------------------------------------------------------

template <class T>
void ascend_range(const AscendArgs& a, int64_t begin, int64_t end) {
  if (a.l2) {
    for (int64_t image = begin; image < end; ++image) l2_image<T>(a, image);
    return;
  }
  const int64_t chunks = a.chunks_of_image();
  while (begin < end) {
    const int64_t image = begin / chunks, chunk = begin % chunks, stop = std::min(chunks, chunk + end - begin);
    const int64_t from = chunk * AscendArgs::kChunk, to = std::min(stop * AscendArgs::kChunk, a.values);
    a.previous ? linf_values<T, true>(a, image, from, to) : linf_values<T, false>(a, image, from, to);
    begin += stop - chunk;
  }
}

}  // namespace

void NIMFAST_LEVEL::ascend(const AscendArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return ascend_range<float>(args, begin, end);
    case ScalarType::kBFloat16: return ascend_range<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return ascend_range<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
