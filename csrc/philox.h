// SPDX-License-Identifier: Apache-2.0
// The noise law, part 1: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// One word at a time, for the device and as the definition; cpu_noise.h draws many at once for the host.
#pragma once
#include <cstdint>

#include "inline.h"

namespace nimfast {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr int kBlockQuads = 64, kBlock = 4 * kBlockQuads;  // what the host draws at once

struct Quad {
  uint32_t x0, x1, x2, x3;
};

NIMFAST_HD uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// The four 32-bit words of `key` at the 64-bit position (high, low). The counter's third word is 0 in draws and the
// stream where keys are folded; the fourth is 1 in the second call of a position (grid.h), else 0.
NIMFAST_HD Quad philox(uint64_t key, uint32_t low, uint32_t high, uint32_t third = 0, uint32_t fourth = 0) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = low, c1 = high, c2 = third, c3 = fourth;
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t high0 = high_product(kMultiplier0, c0), low0 = kMultiplier0 * c0;
    const uint32_t high1 = high_product(kMultiplier1, c2), low1 = kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

// One key for each image: (seed, stream, index) folded into 64 bits.
inline void image_keys(uint64_t seed, uint32_t stream, const uint64_t* indices, uint64_t* keys, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t index = indices[i];
    const Quad words = philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), stream);
    keys[i] = words.x0 | static_cast<uint64_t>(words.x1) << 32;
  }
}

}  // namespace nimfast
