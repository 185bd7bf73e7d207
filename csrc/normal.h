// SPDX-License-Identifier: Apache-2.0
// The noise law, part 2: two words (x, y) become two normals by Box-Muller,
//   U = x 2^-32 + 2^-33,  V = 2 pi (y 2^-32 + 2^-33),  r = sqrt(-2 ln U),  (r cos V, r sin V),
// within 1e-5 (1 + |z|) of exact arithmetic, host and device; times `gain`, since one product per pair is cheaper than
// one per value later.
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

NIMFAST_HD Pair box_muller(uint32_t x, uint32_t y, float gain = 1.0f) {
  // The hardware logarithm has an absolute error of 2^-21.4 near 1, too much under the root: there, ln(1 - t) by its
  // series, with t from the complement of x because 1 - U has lost its bits.
  const float u = fmaf(static_cast<float>(x), kTwoTo32Inverse, kTwoTo33Inverse);
  const float t = fmaf(static_cast<float>(~x), kTwoTo32Inverse, kTwoTo33Inverse);
  const float series = 2.0f * t * fmaf(t, fmaf(t, 1.0f / 3.0f, 0.5f), 1.0f);
  const float square = t < 0x1p-7f ? series : -2.0f * __logf(u);
  // y read as signed is V - 2 pi or V: the same sine and cosine, in the range where the hardware is accurate.
  const float v = fmaf(static_cast<float>(static_cast<int32_t>(y)), 1.4629180792671596e-9f, 7.314590396335798e-10f);
  const float r = gain * square * rsqrtf(square);  // square > 0 always: t >= 2^-33
  return {r * __cosf(v), r * __sinf(v)};
}

#else

// Branch-free, so that a loop over it vectorises; written to need few instructions, since that is what limits it.
// Errors: 6e-7 relative in r, 6e-7 in the sine, 5e-8 in the cosine (minimax polynomials).
NIMFAST_HD Pair box_muller(uint32_t x, uint32_t y, float gain = 1.0f) {
  // x read as signed is 2^32 U or 2^32 (U - 1): the latter keeps the bits that 1 - U loses near U = 1.
  const float s = madd(static_cast<float>(static_cast<int32_t>(x)), kTwoTo32Inverse, kTwoTo33Inverse);
  const float u = s < 0.0f ? s + 1.0f : s;
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = static_cast<int32_t>(bits_of(u));
  const int32_t exponent = (bits - kRootHalf) >> 23;
  const float mantissa = float_of(static_cast<uint32_t>(bits - exponent * (1 << 23)));  // in [sqrt(1/2), sqrt(2))
  const float f = u > 0.75f ? s : mantissa - 1.0f;
  // -2 ln(1 + f) = f q(f), then the exponent's share.
  float q = -0.24421966320230384f;
  q = madd(q, f, 0.37565486918697272f);
  q = madd(q, f, -0.4090951786989444f);
  q = madd(q, f, 0.49793582882588344f);
  q = madd(q, f, -0.6663205835232254f);
  q = madd(q, f, 1.0000279667093876f);
  q = madd(q, f, -2.0000017548147743f);
  const float r = gain * std::sqrt(madd(static_cast<float>(exponent), -1.3862943611198906f, f * q));

  // V in turns, less the half turn that brings it into [-1/4, 1/4): there, sine and cosine are one polynomial each, and
  // the half turn changes the sign of both. It was taken where the upper two bits of y differ.
  const uint32_t twice = y << 1;
  const float v = madd(static_cast<float>(static_cast<int32_t>(twice)), kTwoTo33Inverse, kTwoTo33Inverse);
  const float w = v * v;
  float sine = -70.99339097f;
  sine = madd(sine, w, 81.34076393f);
  sine = madd(sine, w, -41.3371422f);
  sine = madd(sine, w, 6.28316404f);
  float cosine = 56.2426618f;
  cosine = madd(cosine, w, -85.2403714f);
  cosine = madd(cosine, w, 64.93459265f);
  cosine = madd(cosine, w, -19.73917147f);
  cosine = madd(cosine, w, 0.99999995f);
  const float signed_r = float_of(bits_of(r) ^ ((y ^ twice) & 0x80000000u));
  return {signed_r * cosine, signed_r * v * sine};
}

#endif

}  // namespace nimfast
