// SPDX-License-Identifier: Apache-2.0
// random_masks on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "random_masks.h"

#include "cpu_noise.h"
#include "cpu_ops.h"

namespace nimfast {
namespace {

// The L words of sample `number`; returns where they begin in `words`, which holds whole blocks of quads.
inline const uint32_t* draw_row(uint64_t key, uint64_t number, int64_t patches, uint32_t* words) {
  const uint64_t start = number * static_cast<uint64_t>(patches);
  const int64_t skipped = static_cast<int64_t>(start % 4);
  const Schedule schedule(key);
  alignas(64) uint32_t x[kBlock / 2], y[kBlock / 2];
  for (int64_t at = 0; at < skipped + patches; at += kBlock) {
    draw_words(schedule, Consecutive((start + static_cast<uint64_t>(at)) / 4, false), x, y);
    for (int i = 0; i < kBlock / 2; ++i) {
      words[at + 2 * i] = x[i];
      words[at + 2 * i + 1] = y[i];
    }
  }
  return words + skipped;
}

// What a patch is ranked by: its word, then its number.
NIMFAST_HD uint64_t rank_key(uint32_t word, int64_t patch) {
  return static_cast<uint64_t>(word) << 32 | static_cast<uint64_t>(patch);
}

// The bound that the rank keys of exactly `kept` patches do not pass. Radix selection: L steps for a digit of eight
// bits, where a sort takes L log L and mispredicts. Two digits mostly
// suffice: the search ends once all words that share the digits so far are kept.
inline uint64_t select(const uint32_t* words, int64_t patches, int64_t kept) {
  uint64_t prefix = 0;  // the digits so far of the kept-th smallest word, which is the wanted-th among those with them
  int64_t wanted = kept;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint32_t sharing[256] = {};
    for (int64_t l = 0; l < patches; ++l) {
      if (shift == 24 || words[l] >> (shift + 8) == prefix) ++sharing[(words[l] >> shift) & 255u];
    }
    uint32_t digit = 0;
    for (; wanted > sharing[digit]; ++digit) wanted -= sharing[digit];
    prefix = prefix << 8 | digit;
    if (wanted == sharing[digit]) return ((prefix + 1) << (shift + 32)) - 1;
  }
  int64_t l = 0;  // equal words: the lower patches
  for (; wanted > 0; ++l) wanted -= words[l] == prefix;
  return rank_key(static_cast<uint32_t>(prefix), l - 1);
}

inline void write_row(const RandomMasksArgs& a, int64_t row, const uint32_t* words, uint64_t bound) {
  const int64_t patches = a.patches;
  int64_t* __restrict kept = a.kept + row * a.kept_count;
  int64_t* __restrict restore = a.restore + row * patches;
  uint8_t* __restrict mask = a.mask + row * patches;
  for (int64_t l = 0; l < patches; ++l) mask[l] = rank_key(words[l], l) > bound;
  // Arithmetic in place of branches, which a random mask mispredicts: they cost a third of the whole.
  int64_t l = 0, place = 0;  // place: how many were kept so far
  for (; place < a.kept_count; ++l) {
    const int64_t removed = mask[l];
    kept[place] = l;  // overwritten unless kept
    restore[l] = place + removed * (a.kept_count + l - 2 * place);
    place += 1 - removed;
  }
  for (; l < patches; ++l) restore[l] = l;
}

}  // namespace

void NIMFAST_LEVEL::random_masks(const RandomMasksArgs& a, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kMaxPatches + kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.samples;
    const uint64_t number = static_cast<uint64_t>(a.first[b] + row % a.samples);
    const uint32_t* drawn = draw_row(a.keys[b], number, a.patches, words);
    write_row(a, row, drawn, select(drawn, a.patches, a.kept_count));
  }
}

}  // namespace nimfast
