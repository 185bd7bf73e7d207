// SPDX-License-Identifier: Apache-2.0
// Blocks of normals on the CPU. Included by one file compiled once per instruction set, hence the anonymous namespace:
// no copy compiled for a newer processor may stand in for another at link time.
#pragma once
#include "normal.h"
#include "philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace nimfast {
namespace {

// 64-bit lanes of which only the lower half counts: the 32 x 32 -> 64 bit multiplier ignores the upper, so the
// generator never has to mask or shuffle. (Left to itself GCC widens, multiplies 64 x 64 and narrows: 1.5x slower.)
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes product(Lanes a, Lanes b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
constexpr int kUnroll = 4;  // independent chains that hide the multiplier's latency (1 chain: 0.6x the speed)
static_assert(kBlockQuads % (kLanes * kUnroll) == 0, "a block is whole groups of lanes");

// Philox (philox.h) for the quads that counters(i) names, kLanes of them at a time from i; words[w][i] is word w of the
// quad i.
template <class Counters>
inline void draw_words(uint64_t key, Counters counters, uint32_t (&words)[4][kBlockQuads]) {
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
      for (int j = 0; j < kLanes; ++j) {
        const int i = group + u * kLanes + j;
        words[0][i] = static_cast<uint32_t>(c0[u][j]);
        words[1][i] = static_cast<uint32_t>(c1[u][j]);
        words[2][i] = static_cast<uint32_t>(c2[u][j]);
        words[3][i] = static_cast<uint32_t>(c3[u][j]);
      }
    }
  }
}

inline void transform(const uint32_t (&words)[4][kBlockQuads], float gain, float (&normals)[kBlock]) {
  for (int i = 0; i < kBlockQuads; ++i) {
    const Pair p = box_muller(words[0][i], words[1][i], gain), q = box_muller(words[2][i], words[3][i], gain);
    normals[4 * i] = p.a;
    normals[4 * i + 1] = p.b;
    normals[4 * i + 2] = q.a;
    normals[4 * i + 3] = q.b;
  }
}

// `gain` times kBlock normals: the values 4 * first_quad ... of the stream `key`.
inline void draw_normals(uint64_t key, uint64_t first_quad, float gain, float (&normals)[kBlock]) {
  Lanes number{};
  for (int j = 0; j < kLanes; ++j) number[j] = first_quad + static_cast<uint64_t>(j);
  alignas(64) uint32_t words[4][kBlockQuads];
  draw_words(key, [number](int i) { return number + static_cast<uint64_t>(i); }, words);
  transform(words, gain, normals);
}

// The same of any kBlockQuads quads.
inline void draw_normals_at(uint64_t key, const uint64_t (&quads)[kBlockQuads], float gain, float (&normals)[kBlock]) {
  const auto chosen = [&quads](int i) {
    Lanes lanes;
    __builtin_memcpy(&lanes, quads + i, sizeof(lanes));
    return lanes;
  };
  alignas(64) uint32_t words[4][kBlockQuads];
  draw_words(key, chosen, words);
  transform(words, gain, normals);
}

}  // namespace
}  // namespace nimfast
