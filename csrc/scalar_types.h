// SPDX-License-Identifier: Apache-2.0
// Element types that the operations read and write. The host keeps half-precision numbers as their bits and converts
// by integer arithmetic, which every vector unit has; rounding is to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace nimfast {

enum class ScalarType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // the codes that Python passes

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

NIMFAST_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

NIMFAST_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

NIMFAST_HD float load(float value) { return value; }
NIMFAST_HD float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

NIMFAST_HD float load(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias, subnormal numbers included; only Inf and NaN need their own exponent.
  const float scaled = float_of(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of(sign | (magnitude >= 0x0f800000u ? special : bits_of(scaled)));
}

NIMFAST_HD void store(float& out, float value) { out = value; }

NIMFAST_HD void store(BFloat16& out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

NIMFAST_HD void store(Float16& out, float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias and round. Below 2^-14, adding 0.5 makes the adder round at the subnormal's last bit.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace nimfast
