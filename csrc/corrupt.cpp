// SPDX-License-Identifier: Apache-2.0
// corrupt on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "corrupt.h"

#include <algorithm>

#include "cpu_noise.h"
#include "cpu_ops.h"
#include "cpu_write.h"

namespace nimfast {
namespace {

// Blocks [block, stop) of one row. Blocks begin at the quad that holds the row's first value, so up to three values at
// the beginning belong to the row before.
template <class Law, class T>
void corrupt_blocks(const CorruptArgs& a, int64_t row, int64_t block, int64_t stop) {
  const int64_t values = a.channels * a.plane, b = row / a.samples;
  const uint64_t start = static_cast<uint64_t>(a.first[b] + row % a.samples) * static_cast<uint64_t>(values);
  const int64_t skipped = static_cast<int64_t>(start % 4);
  const float* image = a.images + b * a.image_stride;
  T* out = static_cast<T*>(a.out) + row * values;
  int64_t e = std::max<int64_t>(block * kBlock - skipped, 0);  // next value to write
  int64_t c = e / a.plane;
  const Schedule schedule(a.keys[b]);
  const bool stream = a.beyond_caches();
  alignas(64) float z[kBlock];
  for (; block < stop && e < values; ++block) {
    const int64_t at = block * kBlock - skipped, end = std::min(at + kBlock, values);
    while (e < end) {  // once, or once more for every channel that begins within the block
      const int64_t part = std::min(end, (c + 1) * a.plane);
      const Law law = Law::of(a, b, c);
      draw_noise(law, schedule, start / 4 + static_cast<uint64_t>(block * kBlockQuads), z);
      write_values(law, image + e, z + (e - at), a.scale[c], a.shift[c], part - e, out + e, stream);
      e = part;
      c += e == (c + 1) * a.plane;
    }
  }
}

template <class Law, class T>
void corrupt_range(const CorruptArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = a.blocks_of_row();
  while (begin < end) {
    const int64_t row = begin / blocks, block = begin % blocks, stop = std::min(blocks, block + end - begin);
    corrupt_blocks<Law, T>(a, row, block, stop);
    begin += stop - block;
  }
  end_of_stream();
}

template <class T>
void corrupt_of_type(const CorruptArgs& a, int64_t begin, int64_t end) {
  a.grid ? corrupt_range<Grid, T>(a, begin, end) : corrupt_range<Gaussian, T>(a, begin, end);
}

}  // namespace

void NIMFAST_LEVEL::corrupt(const CorruptArgs& args, int64_t begin, int64_t end) {
  switch (args.out_type) {
    case ScalarType::kFloat32: return corrupt_of_type<float>(args, begin, end);
    case ScalarType::kBFloat16: return corrupt_of_type<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return corrupt_of_type<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
