// SPDX-License-Identifier: Apache-2.0
// What drawing noise wants of vectors beside simd.h: the generator's 64-bit lanes, and an order of values. Included by
// files compiled once per instruction set, hence the anonymous namespace.
//
// Lanes: 64-bit lanes of which only the lower half counts: the 32 x 32 -> 64 bit multiplier ignores the upper, so the
// generator never has to mask. (Left to itself GCC widens, multiplies 64 x 64 and narrows: 1.5x slower.)
//   paired(a): lane i beside lane i + half of the lanes, the order that interleave() undoes
//   interleave(a, b, out): a0 b0 a1 b1 ... within every 16 bytes, the one such shuffle that all vector units have
//   lower(a, b), upper(a, b): that half of each lane of a, beside that of b in the upper half
#pragma once
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace nimfast {
namespace {

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
#endif

constexpr int kCounters = sizeof(Lanes) / sizeof(uint64_t);

#if defined(__AVX512F__)

inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Lanes paired(Lanes a) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return reinterpret_cast<Lanes>(_mm512_permutexvar_epi64(order, reinterpret_cast<__m512i>(a)));
}
inline void interleave(Floats a, Floats b, float* out) {
  _mm512_storeu_ps(out, _mm512_unpacklo_ps(a, b));
  _mm512_storeu_ps(out + 16, _mm512_unpackhi_ps(a, b));
}
inline Lanes lower(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(
      _mm512_mask_moveldup_ps(reinterpret_cast<__m512>(a), 0xaaaa, reinterpret_cast<__m512>(b)));
}
inline Lanes upper(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(
      _mm512_mask_movehdup_ps(reinterpret_cast<__m512>(b), 0x5555, reinterpret_cast<__m512>(a)));
}
inline Floats root(Floats a) { return _mm512_sqrt_ps(a); }

#else

inline Lanes lower(Lanes a, Lanes b) { return (a & 0xffffffffu) | (b << 32); }
inline Lanes upper(Lanes a, Lanes b) { return (a >> 32) | (b & ~uint64_t{0xffffffffu}); }

#if defined(__AVX2__)

inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Lanes paired(Lanes a) {
  return reinterpret_cast<Lanes>(_mm256_permute4x64_epi64(reinterpret_cast<__m256i>(a), 0xd8));  // 0 2 1 3
}
inline void interleave(Floats a, Floats b, float* out) {
  _mm256_storeu_ps(out, _mm256_unpacklo_ps(a, b));
  _mm256_storeu_ps(out + 8, _mm256_unpackhi_ps(a, b));
}
inline Floats root(Floats a) { return _mm256_sqrt_ps(a); }

#else

inline Lanes paired(Lanes a) { return a; }  // two lanes: as they are
inline void interleave(Floats a, Floats b, float* out) {
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = a[i];
    out[2 * i + 1] = b[i];
  }
}

#if defined(__SSE2__)
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
inline Floats root(Floats a) { return _mm_sqrt_ps(a); }
#else
inline Lanes product(Lanes a, Lanes b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
inline Floats root(Floats a) {
  for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
#endif
#endif
#endif

}  // namespace
}  // namespace nimfast
