// SPDX-License-Identifier: Apache-2.0
// The two noise laws as corrupt and corrupt_patches draw and add them on CUDA: a pair of values from two neighbouring
// words of a quad, what the clean value is prepared to once, and their sum as it leaves.
#pragma once
#include "grid.h"
#include "normal.h"

namespace nimfast {

struct Gaussian {
  float sigma;  // NaN makes NaN of every value

  template <class Args>
  static __device__ __forceinline__ Gaussian of(const Args& a, int64_t b, bool known) {
    return {known ? a.sigma[b] : NAN};
  }
  // `lane` is that of x in the quad: 0 or 2.
  __device__ __forceinline__ Pair pair(uint64_t, uint64_t, uint32_t x, uint32_t y, int) const {
    return box_muller(x, y);
  }
  __device__ __forceinline__ float prepare(float x, float scale, float shift) const { return fmaf(x, scale, shift); }
  __device__ __forceinline__ float add(float noise, float prepared, float scale, float) const {
    return fmaf(noise, sigma * scale, prepared);
  }
};

// Rare, and a call of its own so that the usual path keeps its registers.
static __device__ __forceinline__ float grid_resolve(const uint64_t* packed, uint64_t key, uint64_t quad, uint32_t word,
                                                  int lane) {
  return static_cast<float>(grid_exact(GridLaw(packed), word, further_word(key, quad, lane)));
}

struct Grid {
  const uint64_t* packed;
  const uint32_t* table;
  int shift;
  float unit;  // 255; NaN makes NaN of every value

  template <class Args>
  static __device__ __forceinline__ Grid of(const Args& a, int64_t, bool known) {
    const GridLaw law(a.grid);
    return {a.grid, law.table, law.shift, known ? 255.0f : NAN};
  }
  __device__ __forceinline__ float value(uint64_t key, uint64_t quad, uint32_t word, int lane) const {
    const uint32_t place = grid_place(word), entry = __ldg(table + (place >> shift));
    if (grid_undecided(place, entry, shift)) return grid_resolve(packed, key, quad, word, lane);
    return static_cast<float>(grid_value(word, place, entry, shift));
  }
  __device__ __forceinline__ Pair pair(uint64_t key, uint64_t quad, uint32_t x, uint32_t y, int lane) const {
    return {value(key, quad, x, lane), value(key, quad, y, lane + 1)};
  }
  __device__ __forceinline__ float prepare(float x, float, float) const { return rintf(x * unit); }
  // Whole numbers: their sum is exact. Never fused, so that all machines give the same bits.
  __device__ __forceinline__ float add(float noise, float prepared, float scale, float shift) const {
    return __fadd_rn(__fmul_rn(noise + prepared, scale), shift);
  }
};

}  // namespace nimfast
