// SPDX-License-Identifier: Apache-2.0
// Blocks of noise on the CPU, of either law. Included by one file compiled once per instruction set, hence the
// anonymous namespace: no copy compiled for a newer processor may stand in for another at link time.
#pragma once
#include "grid.h"
#include "normal.h"
#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace nimfast {
namespace {

// 64-bit lanes of which only the lower half counts: the 32 x 32 -> 64 bit multiplier ignores the upper, so the
// generator never has to mask or shuffle. (Left to itself GCC widens, multiplies 64 x 64 and narrows: 1.5x slower.)
// interleave() makes a0 b0 a1 b1 ... within every 16 bytes, the one such shuffle that all vector units have; it leaves
// values in order whose quads were put in the order of paired(): i beside i + half of the lanes.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Lanes paired(Lanes a) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return reinterpret_cast<Lanes>(_mm512_permutexvar_epi64(order, reinterpret_cast<__m512i>(a)));
}
inline void interleave(const float* a, const float* b, float* low, float* high) {
  _mm512_storeu_ps(low, _mm512_unpacklo_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
  _mm512_storeu_ps(high, _mm512_unpackhi_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
}
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Lanes paired(Lanes a) {
  return reinterpret_cast<Lanes>(_mm256_permute4x64_epi64(reinterpret_cast<__m256i>(a), 0xd8));  // 0 2 1 3
}
inline void interleave(const float* a, const float* b, float* low, float* high) {
  _mm256_storeu_ps(low, _mm256_unpacklo_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b)));
  _mm256_storeu_ps(high, _mm256_unpackhi_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b)));
}
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
#if defined(__SSE2__)
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
#else
inline Lanes product(Lanes a, Lanes b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
inline Lanes paired(Lanes a) { return a; }  // two lanes: as they are
inline void interleave(const float* a, const float* b, float* low, float* high) {
  for (int i = 0; i < 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[i + 2];
    high[2 * i + 1] = b[i + 2];
  }
}
#endif

constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
constexpr int kUnroll = 4;  // independent chains that hide the multiplier's latency (1 chain: 0.6x the speed)
static_assert(kBlockQuads % (kLanes * kUnroll) == 0, "a block is whole groups of lanes");

// Philox (philox.h) for kBlockQuads quads, kLanes of them at a time: counters(i) are those of the groups i ... Their
// words go in pairs: x[2 i] and y[2 i] are x0 and x1 of the i-th counter, x[2 i + 1] and y[2 i + 1] its x2 and x3.
template <class Counters>
inline void draw_words(uint64_t key, Counters counters, uint32_t (&x)[kBlock / 2], uint32_t (&y)[kBlock / 2]) {
  const uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int group = 0; group < kBlockQuads; group += kLanes * kUnroll) {
    Lanes c0[kUnroll], c1[kUnroll], c2[kUnroll], c3[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {  // the first round; of the counter's upper words, which are 0, nothing is left
      const Lanes quad = counters(group + u * kLanes), p0 = product(quad, Lanes{} + kMultiplier0);
      c0[u] = (quad >> 32) ^ key0;
      c1[u] = Lanes{};
      c2[u] = (p0 >> 32) ^ key1;
      c3[u] = p0;
    }
    uint32_t k0 = key0, k1 = key1;
    for (int round = 1; round < kRounds; ++round) {
      k0 += kWeyl0;
      k1 += kWeyl1;
      for (int u = 0; u < kUnroll; ++u) {
        const Lanes p0 = product(c0[u], Lanes{} + kMultiplier0), p1 = product(c2[u], Lanes{} + kMultiplier1);
        c0[u] = (p1 >> 32) ^ c1[u] ^ k0;
        c1[u] = p1;
        c2[u] = (p0 >> 32) ^ c3[u] ^ k1;
        c3[u] = p0;
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const Lanes xs = (c0[u] & 0xffffffffu) | (c2[u] << 32), ys = (c1[u] & 0xffffffffu) | (c3[u] << 32);
      __builtin_memcpy(x + 2 * (group + u * kLanes), &xs, sizeof(xs));
      __builtin_memcpy(y + 2 * (group + u * kLanes), &ys, sizeof(ys));
    }
  }
}

// Gaussian noise times `gain`.
struct Gaussian {
  float gain;

  template <class Args>
  static Gaussian of(const Args& a, int64_t b, int64_t c) {
    return {a.sigma[b] * a.scale[c]};
  }

  template <class Counters>
  void values(uint64_t, Counters, const uint32_t (&x)[kBlock / 2], const uint32_t (&y)[kBlock / 2],
              float (&a)[kBlock / 2], float (&b)[kBlock / 2]) const {
    for (int i = 0; i < kBlock / 2; ++i) {
      const Pair pair = box_muller(x[i], y[i], gain);
      a[i] = pair.a;
      b[i] = pair.b;
    }
  }
};

// Whole numbers of the law on the grid, as floats.
struct Grid {
  GridLaw law;

  template <class Args>
  static Grid of(const Args& a, int64_t, int64_t) {
    return {GridLaw(a.grid)};
  }

  template <class Counters>
  void values(uint64_t key, Counters counters, const uint32_t (&x)[kBlock / 2], const uint32_t (&y)[kBlock / 2],
              float (&a)[kBlock / 2], float (&b)[kBlock / 2]) const {
    look_up(key, counters, x, 0, a);
    look_up(key, counters, y, 1, b);
  }

 private:
  // `odd`: whether the words are x1 and x3 of their quads, not x0 and x2.
  template <class Counters>
  void look_up(uint64_t key, Counters counters, const uint32_t (&word)[kBlock / 2], int odd,
               float (&value)[kBlock / 2]) const {
    alignas(64) uint32_t place[kBlock / 2], entry[kBlock / 2];
    for (int i = 0; i < kBlock / 2; ++i) place[i] = grid_place(word[i]);
#if defined(__AVX512F__)  // GCC 12 would take the vectors apart: 1.58 times the time of Gaussian noise, so 1.28
    for (int i = 0; i < kBlock / 2; i += 16) {
      const __m512i cell = _mm512_srl_epi32(_mm512_load_si512(place + i), _mm_cvtsi32_si128(law.shift));
      _mm512_store_si512(entry + i, _mm512_i32gather_epi32(cell, law.table, 4));
    }
#else
    for (int i = 0; i < kBlock / 2; ++i) entry[i] = law.table[place[i] >> law.shift];
#endif
    uint32_t undecided = 0;
    for (int i = 0; i < kBlock / 2; ++i) {
      value[i] = static_cast<float>(grid_value(word[i], place[i], entry[i], law.shift));
      undecided |= grid_undecided(place[i], entry[i], law.shift) ? 1 : 0;
    }
    if (!undecided) return;
    for (int i = 0; i < kBlock / 2; ++i) {
      if (!grid_undecided(place[i], entry[i], law.shift)) continue;
      const uint64_t quad = counters(i / 2 / kLanes * kLanes)[i / 2 % kLanes];
      value[i] = static_cast<float>(grid_exact(law, word[i], further_word(key, quad, i % 2 * 2 + odd)));
    }
  }
};

template <class Law, class Counters>
inline void draw(const Law& law, uint64_t key, Counters counters, float (&noise)[kBlock]) {
  alignas(64) uint32_t x[kBlock / 2], y[kBlock / 2];
  draw_words(key, counters, x, y);
  alignas(64) float a[kBlock / 2], b[kBlock / 2];
  law.values(key, counters, x, y, a, b);
  for (int i = 0; i < kBlock / 2; i += 2 * kLanes) {
    interleave(a + i, b + i, noise + 2 * i, noise + 2 * i + 2 * kLanes);
  }
}

// kBlock values of noise: those at 4 * first_quad ... of the stream `key`.
template <class Law>
inline void draw_noise(const Law& law, uint64_t key, uint64_t first_quad, float (&noise)[kBlock]) {
  Lanes lane{};
  for (int j = 0; j < kLanes; ++j) lane[j] = static_cast<uint64_t>(j);
  const Lanes number = paired(lane) + first_quad;
  draw(law, key, [number](int i) { return number + static_cast<uint64_t>(i); }, noise);
}

// The same of any kBlockQuads quads.
template <class Law>
inline void draw_noise_at(const Law& law, uint64_t key, const uint64_t (&quads)[kBlockQuads], float (&noise)[kBlock]) {
  const auto chosen = [&quads](int i) {
    Lanes lanes;
    __builtin_memcpy(&lanes, quads + i, sizeof(lanes));
    return paired(lanes);
  };
  draw(law, key, chosen, noise);
}

}  // namespace
}  // namespace nimfast
