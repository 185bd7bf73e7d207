// SPDX-License-Identifier: Apache-2.0
// mask_tokens on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "mask_tokens.h"

#include <algorithm>
#include <cstring>

#include "cpu_ops.h"

namespace nimfast {
namespace {

// Tokens are moved, not computed with: only their size counts.
void replace_range(const MaskTokensArgs& a, int64_t begin, int64_t end, size_t size) {
  const size_t bytes = static_cast<size_t>(a.columns) * size;
  const char* tokens = static_cast<const char*>(a.tokens);
  char* out = static_cast<char*>(a.out);
  for (int64_t row = begin; row < end; ++row) {
    const size_t at = static_cast<size_t>(row) * bytes;
    std::memcpy(out + at, a.mask[row] ? a.mask_token : tokens + at, bytes);
  }
}

template <class T>
void backward_range(const MaskTokensBackwardArgs& a, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(a.columns) * sizeof(T);
  for (int64_t part = begin; part < end; ++part) {
    float* sum = a.partial + part * a.columns;
    std::memset(sum, 0, static_cast<size_t>(a.columns) * sizeof(float));
    const int64_t stop = std::min(a.rows, (part + 1) * a.rows_per_part);
    for (int64_t row = part * a.rows_per_part; row < stop; ++row) {
      const T* gradient = static_cast<const T*>(a.gradient) + row * a.columns;
      T* out = static_cast<T*>(a.out) + row * a.columns;
      if (a.mask[row]) {
        for (int64_t i = 0; i < a.columns; ++i) sum[i] += load(gradient[i]);
        std::memset(out, 0, bytes);
      } else {
        std::memcpy(out, gradient, bytes);
      }
    }
  }
}

}  // namespace

void NIMFAST_LEVEL::mask_tokens(const MaskTokensArgs& args, int64_t begin, int64_t end) {
  replace_range(args, begin, end, args.type == ScalarType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
}

void NIMFAST_LEVEL::mask_tokens_backward(const MaskTokensBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case ScalarType::kFloat32: return backward_range<float>(args, begin, end);
    case ScalarType::kBFloat16: return backward_range<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return backward_range<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
