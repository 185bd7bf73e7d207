// SPDX-License-Identifier: Apache-2.0
// recon_loss on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "recon_loss.h"

#include <algorithm>
#include <cmath>

#include "cpu_ops.h"
#include "normal.h"

namespace nimfast {
namespace {

constexpr int64_t kBuffer = 4096;  // values of a target in the cache at a time: a patch of up to 36 x 36 x 3 at once
constexpr int kWidth = 16;         // independent sums, so that the loop vectorises without reordering one

// Sum of term(i) over [0, count), always in the same order.
template <class Term>
inline float sum(int64_t count, Term term) {
  float part[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (int j = 0; j < kWidth; ++j) part[j] += term(i + j);
  }
  for (; i + 4 <= count; i += 4) {  // patches of 2 x 2 x 3 have nothing else
    for (int j = 0; j < 4; ++j) part[j] += term(i + j);
  }
  for (int j = 0; j < 3 && i + j < count; ++j) part[j] += term(i + j);
  // Written out: a loop over the halves is not unrolled, and took half the time of a patch of 2 x 2.
  for (int j = 0; j < 8; ++j) part[j] += part[j + 8];
  for (int j = 0; j < 4; ++j) part[j] += part[j + 4];
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// `count` pixels of one image row, channels interleaved.
inline void interleave(const ReconLossArgs& a, const float* row, int64_t count, float* __restrict__ out) {
  const int64_t plane = a.height * a.width;
  const float *scale = a.scale, *shift = a.shift;
  if (a.channels == 3) {  // written out: whole vectors are then shuffled and stored
    const float *red = row, *green = row + plane, *blue = row + 2 * plane;
    const float s0 = scale[0], s1 = scale[1], s2 = scale[2], h0 = shift[0], h1 = shift[1], h2 = shift[2];
    for (int64_t i = 0; i < count; ++i) {
      out[3 * i] = madd(red[i], s0, h0);
      out[3 * i + 1] = madd(green[i], s1, h1);
      out[3 * i + 2] = madd(blue[i], s2, h2);
    }
  } else if (a.channels == 1) {
    const float s = scale[0], h = shift[0];
    for (int64_t i = 0; i < count; ++i) out[i] = madd(row[i], s, h);
  } else {
    for (int64_t c = 0; c < a.channels; ++c) {
      const float s = scale[c], h = shift[c];
      for (int64_t i = 0; i < count; ++i) out[i * a.channels + c] = madd(row[c * plane + i], s, h);
    }
  }
}

// The target of one patch, up to kBuffer values at a time.
class Target {
 public:
  Target(const ReconLossArgs& args, const float* corner, float* buffer)
      : a(args), corner_(corner), buffer_(buffer), pixels_(kBuffer / args.channels) {}

  // Calls visit(first, count, values): values [first, first + count) of the patch row, standardised once standardise()
  // has been called.
  template <class Visit>
  inline void blocks(Visit visit) {
    const int64_t all = a.patch * a.patch;
    for (int64_t pixel = 0; pixel < all; pixel += pixels_) {
      const int64_t count = std::min(pixels_, all - pixel);
      read(pixel, count);
      visit(pixel * a.channels, count * a.channels, buffer_);
    }
  }

  // Two passes, with the first value as the origin: no cancellation, and exactly 0 for a constant patch.
  inline void standardise() {
    const int64_t values = a.values();
    const float origin = madd(corner_[0], a.scale[0], a.shift[0]);
    float total = 0.0f, squares = 0.0f;
    blocks(
        [&](int64_t, int64_t count, const float* t) { total += sum(count, [=](int64_t i) { return t[i] - origin; }); });
    const float mean = origin + total / static_cast<float>(values);
    blocks([&](int64_t, int64_t count, const float* t) {
      squares += sum(count, [=](int64_t i) { return (t[i] - mean) * (t[i] - mean); });
    });
    mean_ = mean;
    gain_ = 1.0f / std::sqrt(squares / static_cast<float>(values - 1) + 1e-6f);
    standard_ = true;
    if (held_) scale_buffer(values);
  }

 private:
  inline void read(int64_t pixel, int64_t count) {
    if (held_) return;
    float* out = buffer_;
    const int64_t start = pixel ? pixel / a.patch : 0;  // most patches are one block: no division
    for (int64_t y = start, x = pixel - start * a.patch, left = count; left > 0; ++y, x = 0) {
      const int64_t run = std::min(a.patch - x, left);
      interleave(a, corner_ + y * a.width + x, run, out);
      out += run * a.channels;
      left -= run;
    }
    if (standard_) scale_buffer(count * a.channels);
    held_ = pixels_ >= a.patch * a.patch;  // the whole patch: later passes find it here
  }

  inline void scale_buffer(int64_t count) {
    for (int64_t i = 0; i < count; ++i) buffer_[i] = (buffer_[i] - mean_) * gain_;
  }

  const ReconLossArgs& a;
  const float* corner_;
  float* buffer_;
  int64_t pixels_;  // in a block
  bool held_ = false, standard_ = false;
  float mean_ = 0.0f, gain_ = 1.0f;
};

// Sum of |prediction - target|^p; writes the gradient where there is room for it.
template <class T>
inline float compare(const T* __restrict__ prediction, const float* __restrict__ target, int64_t count, bool squared,
                     float weight, T* __restrict__ gradient) {
  if (squared && gradient) {
    return sum(count, [=](int64_t i) {
      const float difference = load(prediction[i]) - target[i];
      store(gradient[i], weight * difference);
      return difference * difference;
    });
  }
  if (squared) {
    return sum(count, [=](int64_t i) {
      const float difference = load(prediction[i]) - target[i];
      return difference * difference;
    });
  }
  if (gradient) {
    return sum(count, [=](int64_t i) {
      const float difference = load(prediction[i]) - target[i];
      const float below = difference < 0.0f ? -weight : 0.0f;
      store(gradient[i], difference > 0.0f ? weight : below);
      return std::fabs(difference);
    });
  }
  return sum(count, [=](int64_t i) { return std::fabs(load(prediction[i]) - target[i]); });
}

template <class T>
void recon_loss_range(const ReconLossArgs& a, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBuffer];
  const int64_t patches = a.patches(), across = a.width / a.patch, values = a.values();
  const float weight = static_cast<float>(a.power) * a.weight[0];
  const T* prediction = static_cast<const T*>(a.prediction);
  T* gradient = static_cast<T*>(a.gradient);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / patches, l = item % patches;
    const auto counts = [&](int64_t n) { return !a.mask || a.mask[n * patches + l]; };
    const float* corner = a.images + b * a.image_stride + (l / across * a.width + l % across) * a.patch;
    bool any = false;
    for (int64_t n = b * a.samples; n < (b + 1) * a.samples; ++n) {
      a.losses[n * patches + l] = 0.0f;
      any = any || counts(n);
      if (gradient && !counts(n)) std::fill_n(gradient + (n * patches + l) * values, values, T{});
    }
    if (!any) continue;
    Target target(a, corner, buffer);
    if (a.norm_pix) target.standardise();
    target.blocks([&](int64_t first, int64_t count, const float* t) {
      for (int64_t n = b * a.samples; n < (b + 1) * a.samples; ++n) {
        if (!counts(n)) continue;
        const T* row = prediction + n * a.prediction_stride + l * values + first;
        T* out = gradient ? gradient + (n * patches + l) * values + first : nullptr;
        a.losses[n * patches + l] += compare(row, t, count, a.power == 2, weight, out);
      }
    });
  }
}

}  // namespace

void NIMFAST_LEVEL::recon_loss(const ReconLossArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return recon_loss_range<float>(args, begin, end);
    case ScalarType::kBFloat16: return recon_loss_range<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return recon_loss_range<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
