// SPDX-License-Identifier: Apache-2.0
// The noise law, part 2: two words (x, y) become two normals by Box-Muller,
//   U = x 2^-32 + 2^-33,  V = 2 pi (y 2^-32 + 2^-33),  r = sqrt(-2 ln U),  (r cos V, r sin V),
// within 1e-5 (1 + |z|) of exact arithmetic. Here for the device; the host draws whole vectors of pairs (cpu_noise.h).
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

#ifdef __CUDACC__

__device__ __forceinline__ Pair box_muller(uint32_t x, uint32_t y) {
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

#endif

}  // namespace nimfast
