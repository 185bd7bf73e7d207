// SPDX-License-Identifier: Apache-2.0
// The noise law, part 2: two words (x, y) become two normals by Box-Muller,
//   U = x 2^-32 + 2^-33,  V = 2 pi (y 2^-32 + 2^-33),  r = sqrt(-2 ln U),  (r cos V, r sin V),
// within 1e-5 (1 + |z|) of exact arithmetic, host and device.
#pragma once
#include <cmath>
#include <cstdint>

#include "inline.h"
#include "scalar_types.h"

namespace nimfast {

// Fused where the processor has it. Written out, because a compiler that contracts in one place and not in another
// would make a value depend on where in a buffer it stands.
NIMFAST_HD float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct Pair {
  float a, b;
};

constexpr float kTwoTo32Inverse = 2.3283064365386963e-10f, kTwoTo33Inverse = 1.1641532182693481e-10f;

#ifdef __CUDA_ARCH__

NIMFAST_HD Pair box_muller(uint32_t x, uint32_t y) {
  // The hardware logarithm has an absolute error of 2^-21.4 near 1, too much under the root: there, ln(1 - t) by its
  // series, with t from the complement of x because 1 - U has lost its bits.
  const float u = fmaf(static_cast<float>(x), kTwoTo32Inverse, kTwoTo33Inverse);
  const float t = fmaf(static_cast<float>(~x), kTwoTo32Inverse, kTwoTo33Inverse);
  const float series = 2.0f * t * fmaf(t, fmaf(t, 1.0f / 3.0f, 0.5f), 1.0f);
  const float square = t < 0x1p-7f ? series : -2.0f * __logf(u);
  // y read as signed is V - 2 pi or V: the same sine and cosine, in the range where the hardware is accurate.
  const float v = fmaf(static_cast<float>(static_cast<int32_t>(y)), 1.4629180792671596e-9f, 7.314590396335798e-10f);
  const float r = square * rsqrtf(square);  // square > 0 always: t >= 2^-33
  return {r * __cosf(v), r * __sinf(v)};
}

#else

// Branch-free, so that a loop over it vectorises. The polynomials are minimax fits: relative error 1.8e-7 for the
// logarithm, 2e-8 for the sine, 3e-8 for the cosine.
NIMFAST_HD Pair box_muller(uint32_t x, uint32_t y) {
  const float u = madd(static_cast<float>(x), kTwoTo32Inverse, kTwoTo33Inverse);
  const float t = madd(static_cast<float>(~x), kTwoTo32Inverse, kTwoTo33Inverse);  // 1 - U with all its bits
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = static_cast<int32_t>(bits_of(u));
  const int32_t exponent = (bits - kRootHalf) >> 23;
  const float mantissa = float_of(static_cast<uint32_t>(bits - exponent * (1 << 23)));  // in [sqrt(1/2), sqrt(2))
  const float f = u > 0.75f ? -t : mantissa - 1.0f;
  float q = -0.10378720918733422f;
  q = madd(q, f, 0.1633816091604311f);
  q = madd(q, f, -0.17212430253570288f);
  q = madd(q, f, 0.1988423385055027f);
  q = madd(q, f, -0.24971559849153743f);
  q = madd(q, f, 0.33335607946207346f);
  q = madd(q, f, -0.5000034428858613f);
  q = madd(q, f, 0.9999999178542411f);
  const float log_u = madd(static_cast<float>(exponent), 0.69314718055994531f, f * q);
  const float r = std::sqrt(-2.0f * log_u);

  // V in quarter turns: the nearest multiple by integers, the rest (at most 1/8 turn) by polynomials.
  const uint32_t quarter = (y + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(y - (quarter << 30));
  const float v = madd(static_cast<float>(rest), kTwoTo32Inverse, kTwoTo33Inverse);
  const float w = v * v;
  float s = -75.40206782517426f;
  s = madd(s, w, 81.59255353841765f);
  s = madd(s, w, -41.341662633051115f);
  s = madd(s, w, 6.2831852878671945f);
  s *= v;
  float c = -83.59261199061643f;
  c = madd(c, w, 64.92125289221899f);
  c = madd(c, w, -19.739152227964833f);
  c = madd(c, w, 0.9999999724233195f);
  const float cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
  const float signed_cosine = float_of(bits_of(cosine) ^ (((quarter + 1) & 2) << 30));
  const float signed_sine = float_of(bits_of(sine) ^ ((quarter & 2) << 30));
  return {r * signed_cosine, r * signed_sine};
}

#endif

}  // namespace nimfast
