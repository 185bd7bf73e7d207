// SPDX-License-Identifier: Apache-2.0
// Vectors of floats as wide as the instruction set that a file is compiled for.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "inline.h"
#include "normal.h"
#include "scalar_types.h"

namespace nimfast {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

NIMFAST_HD Floats load_lanes(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

#if defined(__AVX512F__)
NIMFAST_HD Floats widened(__m256i halves) {
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
#endif

NIMFAST_HD Floats load_lanes(const BFloat16* from) {
#if defined(__AVX512F__)
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = load(from[i]);
  return value;
#endif
}

// The lanes as another type, rounded as store rounds one (scalar_types.h).
template <class T>
struct Converted;

template <>
struct Converted<float> {
  Floats bits;
  NIMFAST_HD explicit Converted(Floats value) : bits(value) {}
};

template <>
struct Converted<BFloat16> {
#if defined(__AVX512BF16__)
  __m256bh bits;
  NIMFAST_HD explicit Converted(Floats value) : bits(_mm512_cvtneps_pbh(value)) {}
#else
  typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Halves bits;
  NIMFAST_HD explicit Converted(Floats value) {
    const Words word = reinterpret_cast<Words>(value), rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    bits = __builtin_convertvector(value == value ? rounded : Words{} + 0x7fc0, Halves);
  }
#endif
};

template <>
struct Converted<Float16> {
#if defined(__AVX512F__)
  __m256i bits;
  NIMFAST_HD explicit Converted(Floats value)
      : bits(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) {}
#elif defined(__AVX2__) && defined(__F16C__)
  __m128i bits;
  NIMFAST_HD explicit Converted(Floats value)
      : bits(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) {}
#else
  Float16 bits[kLanes];
  NIMFAST_HD explicit Converted(Floats value) {
    for (int i = 0; i < kLanes; ++i) store(bits[i], value[i]);
  }
#endif
};

template <class T>
NIMFAST_HD void store_lanes(T* to, Floats value) {
  const Converted<T> converted(value);
  static_assert(sizeof(converted) == kLanes * sizeof(T));
  std::memcpy(to, &converted, sizeof(converted));
}

// Every bit as it is, so that a lane may hold something else than a float.
NIMFAST_HD Floats all_lanes(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Floats{value, value, value, value};
#endif
}

// The first `count` lanes of a row's last vector, all of them where it is a whole one; zeros in the others. Without
// calls: around one, every constant of a loop would have to leave its register.
template <class T>
NIMFAST_HD Floats load_some(const T* from, int64_t count) {
  if (count >= kLanes) return load_lanes(from);
#if defined(__AVX512F__)
  const __mmask16 first = static_cast<__mmask16>((1 << count) - 1);
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(first, from);
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    return widened(_mm256_maskz_loadu_epi16(first, from));
  }
#else
  Floats value = all_lanes(0.0f);
  for (int i = 0; i < count; ++i) value[i] = load(from[i]);
  return value;
#endif
}

template <class T>
NIMFAST_HD void store_some(T* to, Floats value, int64_t count) {
  if (count >= kLanes) return store_lanes(to, value);
#if defined(__AVX512F__)
  const __mmask16 first = static_cast<__mmask16>((1 << count) - 1);
  const Converted<T> converted(value);
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, first, value);
  } else {
    _mm256_mask_storeu_epi16(to, first, reinterpret_cast<__m256i>(converted.bits));
  }
#else
  for (int i = 0; i < count; ++i) store(to[i], value[i]);
#endif
}

// store_lanes past the caches, where the processor has such a store; `to` is aligned to the vector's size. Other
// threads see it after end_of_stream().
template <class T>
NIMFAST_HD void stream_lanes(T* to, Floats value) {
#if defined(__AVX2__)
  const Converted<T> converted(value);
  if constexpr (sizeof(converted) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(converted.bits));
  } else if constexpr (sizeof(converted) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(converted.bits));
  } else {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(converted.bits));
#endif
  }
#else
  store_lanes(to, value);
#endif
}

NIMFAST_HD void end_of_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// As madd of one float (normal.h).
NIMFAST_HD Floats madd(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
  return a * b + c;
#else
  for (int i = 0; i < kLanes; ++i) c[i] = madd(a[i], b[i], c[i]);
  return c;
#endif
}

// `value` in the first `count` lanes, `rest` in the others.
NIMFAST_HD Floats first_lanes(Floats value, int64_t count, float rest) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Ints limit = Ints{} + static_cast<int32_t>(count < kLanes ? count : kLanes);
  return lane < limit ? value : all_lanes(rest);
}

NIMFAST_HD float sum_of_lanes(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value);
#else
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) value[i] += value[i + width];
  }
  return value[0];
#endif
}

// NaN is passed over.
NIMFAST_HD float largest_lane(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(value);
#else
  float best = value[0];
  for (int i = 1; i < kLanes; ++i) best = value[i] > best ? value[i] : best;
  return best;
#endif
}

// 2^x within 1.5e-7 of it for x from -126 to 127; 2^-126 below, NaN of NaN.
NIMFAST_HD Floats exp2_lanes(Floats x) {
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to whole numbers, which are then the lowest bits
  const Floats least = all_lanes(-126.0f);
  x = x < least ? least : x;
  const Floats shifted = x + all_lanes(kShift);
  const Floats f = x - (shifted - all_lanes(kShift));  // in [-1/2, 1/2]
  Floats power = all_lanes(0.001327646907614932f);     // minimax
  power = madd(power, f, all_lanes(0.009675541311183275f));
  power = madd(power, f, all_lanes(0.05550713282519289f));
  power = madd(power, f, all_lanes(0.24022119724419239f));
  power = madd(power, f, all_lanes(0.6931469670592372f));
  power = madd(power, f, all_lanes(1.0000000716545068f));
  Ints bits, exponent;
  std::memcpy(&bits, &power, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof(bits));
  return x == x ? power : x;  // the lowest bits of NaN may be anything
}

// out[0 .. count) = of(a, b), where `of` takes a vector of each; past the caches if `stream`.
template <class T, class Of>
NIMFAST_HD void map_lanes(const float* a, const float* b, int64_t count, Of of, T* out, bool stream) {
  int64_t i = 0;
  if (stream && reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0) {
    for (; i + kLanes <= count; i += kLanes) stream_lanes(out + i, of(load_lanes(a + i), load_lanes(b + i)));
  }
  for (; i + kLanes <= count; i += kLanes) store_lanes(out + i, of(load_lanes(a + i), load_lanes(b + i)));
  if (i == count) return;
  const int64_t rest = count - i;
  store_some(out + i, of(load_some(a + i, rest), load_some(b + i, rest)), rest);
}

// `count` values times `factor`, as another type.
template <class T>
NIMFAST_HD void store_row(const float* from, float factor, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(to + i, load_lanes(from + i) * factor);
  for (; i < count; ++i) store(to[i], from[i] * factor);
}

}  // namespace nimfast
