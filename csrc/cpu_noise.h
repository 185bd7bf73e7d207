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
// x0 and x1 of the i-th counter, x[2 i + 1] and y[2 i + 1] its x2 and x3. Not inline: within a larger function GCC 12
// runs out of registers and keeps part of the chains in memory, which takes a block 1.3 times as long.
template <class Counters>
__attribute__((noinline)) void draw_words(const Schedule& schedule, const Counters& counters, uint32_t (&x)[kBlock / 2],
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

// -2 ln U of box_muller, times the gain's square: then its root needs no product for the gain.
struct Radius {
  static constexpr int kTerms = 6;
  float terms[kTerms];  // of the logarithm in [1/2, 1), highest first
  float octave;

  explicit Radius(float gain) {
    // Minimax: -2 ln(1 + f) / f for f in [-1/2, 0], 6.5e-6 relative.
    constexpr float kUnit[kTerms] = {1.6927616933453835f,  0.62219027202117f,   0.8067267778017003f,
                                     -0.6273419664989549f, 1.0017909160634286f, -1.999987017096729f};
    for (int i = 0; i < kTerms; ++i) terms[i] = kUnit[i] * (gain * gain);
    octave = -1.3862943611198906f * (gain * gain);
  }
};

// a 2^-n through the exponent, because the multipliers are what is busy. For |a| in [2^-1, 2^32), n up to 100.
NIMFAST_HD Floats scaled_down(Floats a, int n) {
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(a) - (n << 23));
}

// Box-Muller (normal.h) for kSide vectors of pairs; all go through every step before the next: one chain of some 40
// dependent operations after the other leaves units idle, and a block takes 1.2x as long. Without branches, of few
// instructions, and of these few that multiply: there are half as many units for them as for the others. Errors
// (minimax polynomials): 3e-6 relative in r, 7e-8 in sine and cosine.
NIMFAST_HD void box_muller(const uint32_t* x, const uint32_t* y, const Radius& radius, float* noise) {
  Floats f[kSide], q[kSide], r[kSide], v[kSide], w[kSide], sine[kSide], cosine[kSide];
  Ints octaves[kSide];
  const auto each = [](auto step) __attribute__((always_inline)) {
    for (int i = 0; i < kSide; ++i) step(i);
  };
  // A polynomial's next coefficient.
  const auto horner = [each](Floats(&sum)[kSide], const Floats(&at)[kSide], float c) __attribute__((always_inline)) {
    each([&](int i) { sum[i] = madd(sum[i], at[i], all_lanes(c)); });
  };
  // A word read as signed, and the half that puts it in the middle of its interval; never 0.
  const auto centred = [](const uint32_t* from) __attribute__((always_inline)) {
    Ints word;
    __builtin_memcpy(&word, from, sizeof(word));
    return __builtin_convertvector(word, Floats) + 0.5f;
  };

  // Below 1/2, U = m 2^octaves with m in [1/2, 1) and f = m - 1; from there on f = U - 1, as which x is read then: it
  // keeps the bits that 1 - U loses near U = 1.
  each([&](int i) {
    const Floats u = centred(x + i * kLanes);
    constexpr int32_t kHalf = 0x3f000000, kMantissa = 0x7fffff, kTwoTo31 = 0x4f000000;
    const Ints bits = reinterpret_cast<Ints>(u);
    octaves[i] = (u > 0.0f ? bits - kTwoTo31 : Ints{}) >> 23;
    const Floats m = reinterpret_cast<Floats>((bits & kMantissa) | kHalf);
    f[i] = u > 0.0f ? m - 1.0f : scaled_down(u, 32);
    q[i] = all_lanes(radius.terms[0]);
  });
  for (int term = 1; term < Radius::kTerms; ++term) horner(q, f, radius.terms[term]);
  each([&](int i) {
    r[i] = root(madd(__builtin_convertvector(octaves[i], Floats), all_lanes(radius.octave), f[i] * q[i]));
  });

  // V in turns, in [-1/2, 1/2); sqrt(2) times the sine (over v) and the cosine of half the angle, one polynomial each.
  // Then r cos V = r - r s s and r sin V = r s c.
  each([&](int i) {
    v[i] = scaled_down(centred(y + i * kLanes), 32);
    w[i] = v[i] * v[i];
    sine[i] = all_lanes(0.10920607207801218f);
    cosine[i] = all_lanes(0.3106986858189726f);
  });
  horner(sine, w, -0.8457639309294962f);
  horner(cosine, w, -1.883563308673626f);
  horner(sine, w, 3.6062890782657897f);
  horner(cosine, w, 5.739461241711425f);
  horner(sine, w, -7.308241172268576f);
  horner(cosine, w, -6.978850994042594f);
  horner(sine, w, 4.442882835061248f);
  horner(cosine, w, 1.4142134966684587f);
  each([&](int i) {
    const Floats s = v[i] * sine[i], rs = r[i] * s;
    interleave(madd(-rs, s, r[i]), rs * cosine[i], noise + 2 * i * kLanes);
  });
}

// Gaussian noise times a gain.
struct Gaussian {
  Radius radius;
  float rest;  // what is left of the gain where its square is no normal number, or loses its sign

  explicit Gaussian(float gain) : radius(ordinary(gain) ? gain : 1.0f), rest(ordinary(gain) ? 1.0f : gain) {}

  template <class Args>
  static Gaussian of(const Args& a, int64_t b, int64_t c) {
    return Gaussian(a.sigma[b] * a.scale[c]);
  }

  template <class Counters>
  void values(uint64_t, const Counters&, const uint32_t (&x)[kBlock / 2], const uint32_t (&y)[kBlock / 2],
              float (&noise)[kBlock]) const {
    for (int i = 0; i < kBlock / 2; i += kSide * kLanes) box_muller(x + i, y + i, radius, noise + 2 * i);
    if (rest == 1.0f) return;
    for (float& value : noise) value *= rest;
  }

 private:
  static bool ordinary(float gain) { return gain > 1e-12f && gain < 1e12f; }
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
