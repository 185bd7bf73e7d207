// SPDX-License-Identifier: Apache-2.0
// vote_loss on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "vote_loss.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu_ops.h"
#include "normal.h"

namespace nimfast {
namespace {

constexpr int kWidth = 16;  // logits at a time; the last block of a row is padded
// Loops over one block are kept as loops (unroll 1): unrolled first, GCC no longer vectorises them.
constexpr float kInf = __builtin_inff();

template <class T>
NIMFAST_HD void read_block(const T* row, int64_t k, int64_t classes, float padding, float (&block)[kWidth]) {
  if (k + kWidth <= classes) {
#pragma GCC unroll 1
    for (int j = 0; j < kWidth; ++j) block[j] = load(row[k + j]);
  } else {
    for (int j = 0; j < kWidth; ++j) block[j] = k + j < classes ? load(row[k + j]) : padding;
  }
}

// The kPlaces largest logits, among equals the lowest class first, without sorting: each is one integer that orders as
// (logit, then class backwards), so that inserting one is a chain of minima and maxima without branches.
template <int kPlaces>
struct Top {
  int64_t keys[kPlaces];
  float last = -kInf;  // the smallest of them
  bool finite = true;

  NIMFAST_HD Top() {
    for (int64_t& key : keys) key = INT64_MIN;
  }

  static NIMFAST_HD int64_t key_of(float value, int64_t k) {
    const int32_t bits = static_cast<int32_t>(bits_of(value + 0.0f));  // -0 becomes 0, its equal
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return static_cast<int64_t>(ordered) * (int64_t{1} << 32) + (0x7fffffff - k);
  }
  NIMFAST_HD int64_t at(int place) const { return 0x7fffffff - (keys[place] & 0x7fffffff); }

  NIMFAST_HD void look(const float (&block)[kWidth], int64_t k, int count) {
    int unusual = 0;  // above the last so far, NaN or an infinity: rare in a long row
#pragma GCC unroll 1
    for (int j = 0; j < kWidth; ++j) unusual |= !(block[j] <= last) | !(block[j] >= -FLT_MAX);
    if (!unusual) return;
    for (int j = 0; j < count; ++j) {
      if (block[j] <= last && block[j] >= -FLT_MAX) continue;  // in a long row most
      finite = finite && block[j] - block[j] == 0.0f;
      int64_t key = key_of(block[j], k + j);
      for (int64_t& place : keys) {
        const int64_t larger = std::max(place, key);
        key = std::min(place, key);
        place = larger;
      }
    }
    // The key of a place not yet taken reads as NaN, to which nothing compares: every block is looked at until then.
    const int32_t ordered = static_cast<int32_t>(keys[kPlaces - 1] >> 32);
    last = float_of(static_cast<uint32_t>(ordered ^ ((ordered >> 31) & 0x7fffffff)));
  }
};

// exp(x) for x <= 0, within 1e-7; below -87 a number of no weight, not 0.
NIMFAST_HD float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float whole = madd(x, 1.4426950408889634f, 12582912.0f) - 12582912.0f;  // rounds to an integer
  const float f = madd(whole, -1.4286068203094173e-6f, madd(whole, -0.693145751953125f, x));
  float p = 1.9875691500e-4f;
  p = madd(p, f, 1.3981999507e-3f);
  p = madd(p, f, 8.3334519073e-3f);
  p = madd(p, f, 4.1665795894e-2f);
  p = madd(p, f, 1.6666665459e-1f);
  p = madd(p, f, 5.0000001201e-1f);
  p = madd(p, f * f, f) + 1.0f;
  return p * float_of(static_cast<uint32_t>((static_cast<int32_t>(whole) + 127) * (1 << 23)));
}

// Sum of exp(z - largest); the terms go to `terms` if not null.
template <class T>
inline float sum_of_exp(const T* row, int64_t classes, float largest, float* __restrict__ terms) {
  float sums[kWidth] = {};
  for (int64_t k = 0; k < classes; k += kWidth) {
    float block[kWidth];
    read_block(row, k, classes, -kInf, block);
#pragma GCC unroll 1
    for (int j = 0; j < kWidth; ++j) {
      block[j] = exp_negative(block[j] - largest);
      sums[j] += block[j];
    }
    if (terms && k + kWidth <= classes) {
#pragma GCC unroll 1
      for (int j = 0; j < kWidth; ++j) terms[k + j] = block[j];
    } else if (terms) {
      for (int64_t j = 0; k + j < classes; ++j) terms[k + j] = block[j];
    }
  }
  float sum = 0.0f;
  for (int j = 0; j < kWidth; ++j) sum += sums[j];
  return sum;
}

// Loss of one row; its gradient, divided by S, goes to `gradient` if not null.
template <class T>
float row_loss(const VoteLossArgs& a, const T* row, const Top<1>& top, int64_t label, int64_t, float* gradient) {
  const float share = 1.0f / static_cast<float>(a.samples), largest = load(row[top.at(0)]);
  const float sum = sum_of_exp(row, a.classes, largest, gradient);
  if (gradient) {
    const float scale = share / sum;
    for (int64_t k = 0; k < a.classes; ++k) gradient[k] *= scale;
    gradient[label] -= share;
  }
  return std::log(sum) + (largest - load(row[label]));
}

template <class T>
float row_loss(const VoteLossArgs& a, const T* row, const Top<4>& top, int64_t label, int64_t target, float* gradient) {
  const bool targeted = a.kind == VoteLoss::kTargetedDlr;
  const int64_t rival = targeted ? target : top.at(top.at(0) == label ? 1 : 0);
  const int64_t third = top.at(2), fourth = targeted ? top.at(3) : third;
  const float low = 0.5f * (load(row[third]) + load(row[fourth]));
  const float inverse = 1.0f / (load(row[top.at(0)]) - low + 1e-12f);
  const float loss = (load(row[rival]) - load(row[label])) * inverse;
  if (gradient) {
    const float share = inverse / static_cast<float>(a.samples);
    std::fill_n(gradient, a.classes, 0.0f);
    gradient[rival] += share;  // some of the five may be one class
    gradient[label] -= share;
    gradient[top.at(0)] -= loss * share;
    gradient[third] += 0.5f * loss * share;
    gradient[fourth] += 0.5f * loss * share;
  }
  return loss;
}

template <class T, int kPlaces>
void vote_loss_range(const VoteLossArgs& a, int64_t begin, int64_t end) {
  const auto is_class = [&a](int64_t k) { return k >= 0 && k < a.classes; };
  for (int64_t image = begin; image < end; ++image) {
    const int64_t label = a.labels[image], target = a.targets ? a.targets[image] : 0;
    const bool valid = is_class(label) && is_class(target);
    double sum = 0.0;
    int64_t missed = 0;
    for (int64_t row = image * a.samples; row < (image + 1) * a.samples; ++row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.classes;
      float* gradient = a.gradient ? a.gradient + row * a.classes : nullptr;
      Top<kPlaces> top;
      for (int64_t k = 0; k < a.classes; k += kWidth) {
        float block[kWidth];
        read_block(logits, k, a.classes, -FLT_MAX, block);
        top.look(block, k, static_cast<int>(std::min<int64_t>(kWidth, a.classes - k)));
      }
      if (valid && top.finite) {
        missed += top.at(0) != label;
        sum += static_cast<double>(row_loss(a, logits, top, label, target, gradient));
      } else {
        missed += 1;
        sum += std::nan("");
        if (gradient) std::fill_n(gradient, a.classes, std::nanf(""));
      }
    }
    a.loss[image] = static_cast<float>(sum / static_cast<double>(a.samples));
    a.missed[image] = missed;
  }
}

template <class T>
void vote_loss_of(const VoteLossArgs& a, int64_t begin, int64_t end) {
  a.kind == VoteLoss::kCrossEntropy ? vote_loss_range<T, 1>(a, begin, end) : vote_loss_range<T, 4>(a, begin, end);
}

}  // namespace

void NIMFAST_LEVEL::vote_loss(const VoteLossArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return vote_loss_of<float>(args, begin, end);
    case ScalarType::kBFloat16: return vote_loss_of<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return vote_loss_of<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
