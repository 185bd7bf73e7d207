// SPDX-License-Identifier: Apache-2.0
// Blocks of noise on the CPU, of either law. Included by one file compiled once per instruction set, hence the
// anonymous namespace: no copy compiled for a newer processor may stand in for another at link time.
#pragma once
#include "cpu_vectors.h"
#include "grid.h"
#include "philox.h"

namespace nimfast {
namespace {

constexpr int kUnroll = kCounters == 8 ? 8 : 4;  // independent chains that hide the multiplier's latency
static_assert(kBlockQuads % (kCounters * kUnroll) == 0, "a block is whole groups of lanes");

// A key and those of all rounds, in memory: there, a vector operation reads and spreads one at no cost.
struct Schedule {
  uint64_t key;
  uint64_t key0[kRounds], key1[kRounds];
  uint64_t last;  // both of the last round

  explicit Schedule(uint64_t of) : key(of) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      key0[round] = k0;
      key1[round] = k1;
    }
    last = key0[kRounds - 1] | key1[kRounds - 1] << 32;
  }
};

// The quads of a block that follow one another: (i) gives the i-th and its neighbours, in the order of paired() or not.
struct Consecutive {
  uint64_t first;
  Lanes order{};

  explicit Consecutive(uint64_t first_quad, bool in_pairs = true) : first(first_quad) {
    for (int j = 0; j < kCounters; ++j) order[j] = static_cast<uint64_t>(j);
    if (in_pairs) order = paired(order);
  }
  Lanes operator()(int i) const { return order + (first + static_cast<uint64_t>(i)); }
  uint64_t differing() const { return first ^ (first + kBlockQuads - 1); }
};

// Any quads, in the order of paired().
struct Chosen {
  const uint64_t (&quads)[kBlockQuads];

  Lanes operator()(int i) const {
    Lanes lanes;
    __builtin_memcpy(&lanes, quads + i, sizeof(lanes));
    return paired(lanes);
  }
  uint64_t differing() const {  // the bits in which some do
    uint64_t bits = 0;
    for (const uint64_t quad : quads) bits |= quad ^ quads[0];
    return bits;
  }
};

// Philox (philox.h) for kBlockQuads quads, kCounters of them at a time. Their words go in pairs: x[2 i] and y[2 i] are
// x0 and x1 of the i-th counter, x[2 i + 1] and y[2 i + 1] its x2 and x3.
template <class Counters>
inline void draw_words(const Schedule& schedule, const Counters& counters, uint32_t (&x)[kBlock / 2],
                       uint32_t (&y)[kBlock / 2]) {
  if (counters.differing() >> 32) {  // one block in 2^26: the lanes do not share the counter's second word
    for (int i = 0; i < kBlockQuads; ++i) {
      const uint64_t quad = counters(i / kCounters * kCounters)[i % kCounters];
      const Quad words = philox(schedule.key, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32));
      x[2 * i] = words.x0;
      y[2 * i] = words.x1;
      x[2 * i + 1] = words.x2;
      y[2 * i + 1] = words.x3;
    }
    return;
  }
  const Lanes multiplier0 = Lanes{} + kMultiplier0, multiplier1 = Lanes{} + kMultiplier1;
  const uint64_t second = (schedule.key0[0] ^ counters(0)[0] >> 32) * kMultiplier0;  // the same for all
  for (int group = 0; group < kBlockQuads; group += kCounters * kUnroll) {
    Lanes c0[kUnroll], c1[kUnroll], c2[kUnroll], c3[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {  // the first two rounds: of the counter, only its lowest word differs
      const Lanes p0 = product(counters(group + u * kCounters), multiplier0);
      const Lanes p1 = product((p0 >> 32) ^ schedule.key1[0], multiplier1);
      c0[u] = (p1 >> 32) ^ schedule.key0[1];
      c1[u] = p1;
      c2[u] = p0 ^ (second >> 32) ^ schedule.key1[1];
      c3[u] = Lanes{} + second;
    }
#pragma GCC unroll 8
    for (int round = 2; round < kRounds - 1; ++round) {
      for (int u = 0; u < kUnroll; ++u) {
        const Lanes p0 = product(c0[u], multiplier0), p1 = product(c2[u], multiplier1);
        c0[u] = (p1 >> 32) ^ c1[u] ^ schedule.key0[round];
        c1[u] = p1;
        c2[u] = (p0 >> 32) ^ c3[u] ^ schedule.key1[round];
        c3[u] = p0;
      }
    }
    for (int u = 0; u < kUnroll; ++u) {  // the last round, straight to two words a lane
      const Lanes p0 = product(c0[u], multiplier0), p1 = product(c2[u], multiplier1);
      const Lanes xs = upper(p1, p0) ^ lower(c1[u], c3[u]) ^ schedule.last, ys = lower(p1, p0);
      __builtin_memcpy(x + 2 * (group + u * kCounters), &xs, sizeof(xs));
      __builtin_memcpy(y + 2 * (group + u * kCounters), &ys, sizeof(ys));
    }
  }
}

constexpr int kSide = 2;  // vectors of pairs side by side
static_assert(kBlock / 2 % (kSide * kLanes) == 0, "a block is whole groups of pairs");

// Box-Muller (normal.h) for kSide vectors of pairs, times `gain`; both go through every step before the next: one chain
// of some 40 dependent operations after the other leaves units idle, and a block takes 1.2x as long. Without branches,
// of few instructions. Errors: 6e-7 relative in r, 6e-7 in the sine, 5e-8 in the cosine (minimax polynomials).
NIMFAST_HD void box_muller(const uint32_t* x, const uint32_t* y, float gain, float* noise) {
  Floats f[kSide], q[kSide], r[kSide], v[kSide], w[kSide], sine[kSide], cosine[kSide];
  Ints exponent[kSide], half_turn[kSide];
  const auto each = [](auto step) __attribute__((always_inline)) {
    for (int i = 0; i < kSide; ++i) step(i);
  };
  // A polynomial's next coefficient.
  const auto horner = [each](Floats(&sum)[kSide], const Floats(&at)[kSide], float c) __attribute__((always_inline)) {
    each([&](int i) { sum[i] = madd(sum[i], at[i], Floats{} + c); });
  };

  each([&](int i) {
    Ints word;
    __builtin_memcpy(&word, x + i * kLanes, sizeof(word));
    // x read as signed is 2^32 U or 2^32 (U - 1): the latter keeps the bits that 1 - U loses near U = 1.
    f[i] = madd(__builtin_convertvector(word, Floats), Floats{} + kTwoTo32Inverse, Floats{} + kTwoTo33Inverse);
  });
  each([&](int i) {
    const Floats u = f[i] < 0.0f ? f[i] + 1.0f : f[i];
    constexpr int32_t kRootHalf = 0x3f3504f3;
    const Ints bits = reinterpret_cast<Ints>(u);
    exponent[i] = (bits - kRootHalf) >> 23;
    const Floats mantissa = reinterpret_cast<Floats>(bits - (exponent[i] << 23));  // in [sqrt(1/2), sqrt(2))
    f[i] = u > 0.75f ? f[i] : mantissa - 1.0f;
  });
  // -2 ln(1 + f) = f q(f), then the exponent's share.
  each([&](int i) { q[i] = Floats{} - 0.24421966320230384f; });
  horner(q, f, 0.37565486918697272f);
  horner(q, f, -0.4090951786989444f);
  horner(q, f, 0.49793582882588344f);
  horner(q, f, -0.6663205835232254f);
  horner(q, f, 1.0000279667093876f);
  horner(q, f, -2.0000017548147743f);
  each([&](int i) {
    const Floats square =
        madd(__builtin_convertvector(exponent[i], Floats), Floats{} - 1.3862943611198906f, f[i] * q[i]);
    r[i] = root(square) * gain;
  });

  // V in turns, less the half turn that brings it into [-1/4, 1/4): there, sine and cosine are one polynomial each, and
  // the half turn changes the sign of both. It was taken where the upper two bits of y differ.
  each([&](int i) {
    Ints word;
    __builtin_memcpy(&word, y + i * kLanes, sizeof(word));
    const Ints twice = word << 1;
    half_turn[i] = (word ^ twice) & INT32_MIN;
    v[i] = madd(__builtin_convertvector(twice, Floats), Floats{} + kTwoTo33Inverse, Floats{} + kTwoTo33Inverse);
    w[i] = v[i] * v[i];
    sine[i] = Floats{} - 70.99339097f;
    cosine[i] = Floats{} + 56.2426618f;
  });
  horner(sine, w, 81.34076393f);
  horner(cosine, w, -85.2403714f);
  horner(sine, w, -41.3371422f);
  horner(cosine, w, 64.93459265f);
  horner(sine, w, 6.28316404f);
  horner(cosine, w, -19.73917147f);
  horner(cosine, w, 0.99999995f);
  each([&](int i) {
    const Floats signed_r = reinterpret_cast<Floats>(reinterpret_cast<Ints>(r[i]) ^ half_turn[i]);
    interleave(signed_r * cosine[i], signed_r * v[i] * sine[i], noise + 2 * i * kLanes);
  });
}

// Gaussian noise times `gain`.
struct Gaussian {
  float gain;

  template <class Args>
  static Gaussian of(const Args& a, int64_t b, int64_t c) {
    return {a.sigma[b] * a.scale[c]};
  }

  template <class Counters>
  void values(uint64_t, const Counters&, const uint32_t (&x)[kBlock / 2], const uint32_t (&y)[kBlock / 2],
              float (&noise)[kBlock]) const {
    for (int i = 0; i < kBlock / 2; i += kSide * kLanes) box_muller(x + i, y + i, gain, noise + 2 * i);
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
  void values(uint64_t key, const Counters& counters, const uint32_t (&x)[kBlock / 2], const uint32_t (&y)[kBlock / 2],
              float (&noise)[kBlock]) const {
    alignas(64) float a[kBlock / 2], b[kBlock / 2];
    look_up(key, counters, x, 0, a);
    look_up(key, counters, y, 1, b);
    for (int i = 0; i < kBlock / 2; i += kLanes) {
      Floats low, high;
      __builtin_memcpy(&low, a + i, sizeof(low));
      __builtin_memcpy(&high, b + i, sizeof(high));
      interleave(low, high, noise + 2 * i);
    }
  }

 private:
  // `odd`: whether the words are x1 and x3 of their quads, not x0 and x2.
  template <class Counters>
  void look_up(uint64_t key, const Counters& counters, const uint32_t (&word)[kBlock / 2], int odd,
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
      const uint64_t quad = counters(i / 2 / kCounters * kCounters)[i / 2 % kCounters];
      value[i] = static_cast<float>(grid_exact(law, word[i], further_word(key, quad, i % 2 * 2 + odd)));
    }
  }
};

template <class Law, class Counters>
inline void draw(const Law& law, const Schedule& schedule, const Counters& counters, float (&noise)[kBlock]) {
  alignas(64) uint32_t x[kBlock / 2], y[kBlock / 2];
  draw_words(schedule, counters, x, y);
  law.values(schedule.key, counters, x, y, noise);
}

// kBlock values of noise: those at 4 * first_quad ... of the stream of `schedule`.
template <class Law>
inline void draw_noise(const Law& law, const Schedule& schedule, uint64_t first_quad, float (&noise)[kBlock]) {
  draw(law, schedule, Consecutive(first_quad), noise);
}

// The same of any kBlockQuads quads.
template <class Law>
inline void draw_noise_at(const Law& law, const Schedule& schedule, const uint64_t (&quads)[kBlockQuads],
                          float (&noise)[kBlock]) {
  draw(law, schedule, Chosen{quads}, noise);
}

}  // namespace
}  // namespace nimfast
