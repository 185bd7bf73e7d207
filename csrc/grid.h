// SPDX-License-Identifier: Apache-2.0
// The noise law on the 8-bit grid, the exact discretised normal (nimfast/ops/grid.py defines it): from a position's
// word the whole number it stands for, by one entry of a table. Where the word does not decide, which a draw in 10^5
// meets, the 64 bits do.
#pragma once
#include "philox.h"
#include "scalar_types.h"

namespace nimfast {

struct GridLaw {
  const uint64_t* thresholds;  // [count], never increasing
  const uint32_t* table;
  int64_t count;
  int shift;

  // As Python packs it: shift, count, thresholds, table.
  NIMFAST_HD explicit GridLaw(const uint64_t* packed)
      : thresholds(packed + 2),
        table(reinterpret_cast<const uint32_t*>(packed + 2 + packed[1])),
        count(static_cast<int64_t>(packed[1])),
        shift(static_cast<int>(packed[0])) {}
};

constexpr uint32_t kHalfBits = 0x3f000000u;  // of 0.5f

// All ones where the word stands for a negative number, or for 0 seen from below.
NIMFAST_HD uint32_t grid_sign(uint32_t word) { return ~static_cast<uint32_t>(static_cast<int32_t>(word) >> 31); }

// Where in its tail the word lies, as the bits of a float: in [0, 2^31] after folding, 0 the far end.
NIMFAST_HD uint32_t grid_place(uint32_t word) {
  const int32_t folded = static_cast<int32_t>(word ^ ~grid_sign(word));
  return bits_of(static_cast<float>(folded) + 0.5f) - kHalfBits;
}

NIMFAST_HD int32_t grid_signed(uint32_t size, uint32_t sign) { return static_cast<int32_t>((size ^ sign) - sign); }

NIMFAST_HD uint32_t grid_below(uint32_t place, int shift) { return place & ((1u << shift) - 1); }

// The value of a word, by the entry of the table for its place ...
NIMFAST_HD int32_t grid_value(uint32_t word, uint32_t place, uint32_t entry, int shift) {
  const uint32_t past = grid_below(place, shift) > (entry & 0xffffu) ? 1 : 0;
  return grid_signed((entry >> 16) - past, grid_sign(word));
}

// ... unless all 64 bits decide.
NIMFAST_HD bool grid_undecided(uint32_t place, uint32_t entry, int shift) {
  return grid_below(place, shift) == (entry & 0xffffu);
}

// The value of all 64 bits: the word, and the one further on at the same position.
NIMFAST_HD int32_t grid_exact(const GridLaw& law, uint32_t word, uint32_t further) {
  const uint32_t sign = grid_sign(word);
  const uint64_t folded = (static_cast<uint64_t>(word ^ ~sign) << 32) | (further ^ ~sign);
  int64_t low = 0, high = law.count;  // thresholds before `low` are above `folded`, those from `high` on are not
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (folded < law.thresholds[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return grid_signed(static_cast<uint32_t>(low), sign);
}

// Word `lane` of a quad's second call, whose counter ends in 1.
NIMFAST_HD uint32_t further_word(uint64_t key, uint64_t quad, int lane) {
  const Quad words = philox(key, static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), 0, 1);
  return lane < 2 ? (lane == 0 ? words.x0 : words.x1) : (lane == 2 ? words.x2 : words.x3);
}

}  // namespace nimfast
