// SPDX-License-Identifier: Apache-2.0
// What corrupt and corrupt_patches do with normals on the CPU. In the anonymous namespace as cpu_normals.h.
#pragma once
#include "normal.h"

namespace nimfast {
namespace {

// out[0..count) for values of one channel, z already holding the noise in the units of the output.
template <class T>
inline void write_values(const float* x, const float* z, float scale, float shift, int64_t count, T* out) {
  if (scale == 1.0f && shift == 0.0f) {  // not normalised: the multipliers are what limits the CPU
    for (int64_t i = 0; i < count; ++i) store(out[i], z[i] + x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store(out[i], z[i] + madd(x[i], scale, shift));
  }
}

}  // namespace
}  // namespace nimfast
