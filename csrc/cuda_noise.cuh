// SPDX-License-Identifier: Apache-2.0
// The two noise laws as corrupt and corrupt_patches draw and add them on CUDA: a pair of values from two neighbouring
// words of a quad, what the clean value is prepared to once, and their sum as it leaves.
#pragma once
#include "grid.h"
#include "normal.h"

namespace nimfast {

struct Gaussian {
  static constexpr int kBlocks = 0;  // wanted on a multiprocessor: left to the compiler
  float sigma;                       // NaN makes NaN of every value

  template <class Args>
  static __device__ __forceinline__ Gaussian of(const Args& a, int64_t b) {
    return {a.sigma[b]};
  }
  __device__ __forceinline__ Gaussian unknown() const { return {NAN}; }
  // `lane` is that of x in the quad: 0 or 2.
  __device__ __forceinline__ Pair pair(uint64_t, uint64_t, uint32_t x, uint32_t y, int) const {
    return box_muller(x, y);
  }
  __device__ __forceinline__ float prepare(float x, float scale, float shift) const { return fmaf(x, scale, shift); }
  __device__ __forceinline__ float add(float noise, float prepared, float scale, float) const {
    return fmaf(noise, sigma * scale, prepared);
  }
};

struct Grid {
  static constexpr int kBlocks = 4;  // left to it, it would spill a register for a fifth or sixth block
  const uint64_t* packed;
  const uint32_t* table;
  int shift;
  float unit;  // 255; NaN makes NaN of every value

  template <class Args>
  static __device__ __forceinline__ Grid of(const Args& a, int64_t) {
    const GridLaw law(a.grid);
    return {a.grid, law.table, law.shift, 255.0f};
  }
  __device__ __forceinline__ Grid unknown() const { return {packed, table, shift, NAN}; }
  __device__ __forceinline__ Pair pair(uint64_t key, uint64_t quad, uint32_t x, uint32_t y, int lane) const {
    const uint32_t place_x = grid_place(x), entry_x = __ldg(table + (place_x >> shift));
    const uint32_t place_y = grid_place(y), entry_y = __ldg(table + (place_y >> shift));
    int32_t a = grid_value(x, place_x, entry_x, shift), b = grid_value(y, place_y, entry_y, shift);
    // Both at once: one rare branch for the compiler to keep registers for.
    if (grid_undecided(place_x, entry_x, shift) || grid_undecided(place_y, entry_y, shift)) {
      const GridLaw law(packed);
      a = grid_exact(law, x, further_word(key, quad, lane));
      b = grid_exact(law, y, further_word(key, quad, lane + 1));
    }
    return {static_cast<float>(a), static_cast<float>(b)};
  }
  __device__ __forceinline__ float prepare(float x, float, float) const { return rintf(x * unit); }
  // Whole numbers: their sum is exact. Never fused, so that all machines give the same bits.
  __device__ __forceinline__ float add(float noise, float prepared, float scale, float shift) const {
    return __fadd_rn(__fmul_rn(noise + prepared, scale), shift);
  }
};

}  // namespace nimfast
