// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace nimfast {

// Where row `row` of the images `kept` stands among the rows of all images, `tokens` each; `kept` null: there.
inline int64_t place_of(int64_t row, const int64_t* kept, int64_t tokens) {
  return kept ? kept[row / tokens] * tokens + row % tokens : row;
}

}  // namespace nimfast
