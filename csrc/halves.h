// SPDX-License-Identifier: Apache-2.0
// Vectors of bfloat16 values. Included by files compiled once per instruction set, hence the anonymous namespace.
#pragma once
#include "simd.h"

namespace nimfast {
namespace {

Floats load_halves(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = load(from[i]);
  return value;
#endif
}

void store_halves(BFloat16* to, Floats value) {
  alignas(64) float values[kLanes];
  store_lanes(values, value);
  store_row(values, 1.0f, kLanes, to);
}

}  // namespace
}  // namespace nimfast
