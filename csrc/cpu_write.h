// SPDX-License-Identifier: Apache-2.0
// What corrupt and corrupt_patches do with noise on the CPU. In the anonymous namespace as cpu_noise.h.
#pragma once
#include "cpu_noise.h"

namespace nimfast {
namespace {

constexpr float kRoundToWhole = 0x1.8p23f;  // at this size a float holds whole numbers only; vectors have no std::rint

// out[0..count) for values of one channel, z already holding the noise, past the caches if `stream`: in the units of
// the output, ...
template <class T>
inline void write_values(const Gaussian&, const float* x, const float* z, float scale, float shift, int64_t count,
                         T* __restrict out, bool stream = false) {
  if (scale == 1.0f && shift == 0.0f) {  // not normalised: the multipliers are what limits the CPU
    map_lanes(x, z, count, [](Floats clean, Floats noise) { return noise + clean; }, out, stream);
  } else {
    const Floats by = all_lanes(scale), to = all_lanes(shift);
    map_lanes(x, z, count, [by, to](Floats clean, Floats noise) { return noise + madd(clean, by, to); }, out, stream);
  }
}

// ... or whole numbers. Sums of those are exact in float; the product and the sum that normalise are never fused, so
// that all machines give the same bits.
template <class T>
inline void write_values(const Grid&, const float* x, const float* z, float scale, float shift, int64_t count,
                         T* __restrict out, bool stream = false) {
  const auto on_grid = [scale, shift](Floats clean, Floats noise) {
    const Floats whole = (clean * 255.0f + kRoundToWhole) - kRoundToWhole + noise;
    return whole * scale + shift;
  };
  map_lanes(x, z, count, on_grid, out, stream);
}

}  // namespace
}  // namespace nimfast
