// SPDX-License-Identifier: Apache-2.0
// corrupt_patches on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
// The runs of an item lie one after the other in the output, so after gathering every loop goes over whole blocks.
#include "corrupt_patches.h"

#include <cstring>

#include "cpu_noise.h"
#include "cpu_ops.h"
#include "cpu_write.h"

namespace nimfast {
namespace {

// The runs of one item. They are equally long: a row cut into pieces has one piece in an item.
struct Runs {
  int64_t sample;
  int64_t place[kBlockQuads];  // of the first value in the plane of a channel
  int64_t count, length, values;
  int64_t out;  // number of the first pixel in the output

  Runs(const CorruptPatchesArgs& a, int64_t number) : sample(number / a.items_of_sample()) {
    const int64_t item = number % a.items_of_sample();
    const int64_t begin = item * a.runs_of_item(), per_row = a.runs_of_row();
    int64_t k = begin / (a.patch * per_row), row = begin / per_row % a.patch;
    const int64_t from = begin % per_row * a.run_length();
    count = std::min(a.runs_of_item(), a.runs_of_sample() - begin);
    length = std::min(a.run_length(), a.patch - from);
    values = count * length;
    out = ((sample * a.kept_count + k) * a.patch + row) * a.patch + from;
    const uint32_t columns = static_cast<uint32_t>(a.width / a.patch);  // 64-bit division takes twice as long
    int64_t at = 0;
    for (int64_t j = 0; j < count; ++j, at += a.width) {
      if (j == 0 || row == a.patch) {
        const uint32_t l = static_cast<uint32_t>(a.kept ? a.kept[sample * a.kept_count + k] : k);
        row = j == 0 ? row : 0;
        at = (l / columns * a.patch + row) * a.width + l % columns * a.patch + from;
        ++k;
      }
      ++row;
      place[j] = at;
    }
  }

  // Runs lie far apart, where no processor looks ahead: asked for while the item before is drawn, they arrive in time.
  void prefetch(const CorruptPatchesArgs& a, int64_t c) const {
    const float* plane = a.images + sample / a.samples * a.image_stride + c * a.height * a.width;
    for (int64_t j = 0; j < count; ++j) __builtin_prefetch(plane + place[j]);
    if (length <= 4) return;  // 16 bytes: one cache line, where images are aligned as torch aligns them
    for (int64_t j = 0; j < count; ++j) __builtin_prefetch(plane + place[j] + length - 1);
  }
};

// Noise and clean values of an item's runs in one channel, one run after the other.
struct Block {
  alignas(64) float noise[kBlock], clean[kBlock];
};

// Draws the block of one channel, whose first value stands at position `start` and at `plane`. kPatch is the patch
// size, 0 any other: of the usual sizes every copy is a few moves, of an unknown size it is a call.
template <int kPatch, class Law>
void draw_runs(const CorruptPatchesArgs& a, const Runs& runs, const Schedule& schedule, uint64_t start, const Law& law,
               const float* plane, Block& block) {
  const int64_t length = kPatch ? kPatch : runs.length, patch = kPatch ? kPatch : a.patch;
  const int64_t quads_of_run = kPatch ? CorruptPatchesArgs::quads_of_run(kPatch) : a.quads_of_run();
  const size_t bytes = static_cast<size_t>(length) * sizeof(float);
  alignas(64) uint64_t quads[kBlockQuads];
  for (int64_t j = 0; j < runs.count; ++j) {
    const uint64_t first = (start + static_cast<uint64_t>(runs.place[j])) / 4;
    for (int64_t i = 0; i < quads_of_run; ++i) quads[j * quads_of_run + i] = first + static_cast<uint64_t>(i);
  }
  for (int64_t i = runs.count * quads_of_run; i < kBlockQuads; ++i) quads[i] = quads[0];  // drawn, not used
  alignas(64) float drawn[kBlock];
  draw_noise_at(law, schedule, quads, patch % 4 == 0 ? block.noise : drawn);
  for (int64_t j = 0; j < runs.count; ++j) {
    std::memcpy(block.clean + j * length, plane + runs.place[j], bytes);
    if (patch % 4 == 0) continue;
    // A run begins and ends inside quads.
    const float* run = drawn + 4 * quads_of_run * j + (start + static_cast<uint64_t>(runs.place[j])) % 4;
    std::memcpy(block.noise + j * length, run, bytes);
  }
}

// The item's values in channel c: out[0 .. runs.values).
template <class Law, class T>
void corrupt_channel(const CorruptPatchesArgs& a, const Runs& runs, const Runs& next, const Schedule& schedule,
                     int64_t c, T* out) {
  const int64_t size = a.height * a.width, b = runs.sample / a.samples;
  const uint64_t number = static_cast<uint64_t>(a.first[b] + runs.sample % a.samples);
  const uint64_t start = (number * static_cast<uint64_t>(a.channels) + static_cast<uint64_t>(c)) * size;
  const float* plane = a.images + b * a.image_stride + c * size;
  const Law law = Law::of(a, b, c);
  next.prefetch(a, c);
  Block block;
  switch (a.patch) {
    case 2: draw_runs<2>(a, runs, schedule, start, law, plane, block); break;
    case 4: draw_runs<4>(a, runs, schedule, start, law, plane, block); break;
    case 8: draw_runs<8>(a, runs, schedule, start, law, plane, block); break;
    case 14: draw_runs<14>(a, runs, schedule, start, law, plane, block); break;
    case 16: draw_runs<16>(a, runs, schedule, start, law, plane, block); break;
    default: draw_runs<0>(a, runs, schedule, start, law, plane, block);
  }
  write_values(law, block.clean, block.noise, a.scale[c], a.shift[c], runs.values, out);
}

template <class Law, class T>
void corrupt_item(const CorruptPatchesArgs& a, const Runs& runs, const Runs& next) {
  T* out = static_cast<T*>(a.out) + runs.out * a.channels;
  const Schedule schedule(a.keys[runs.sample / a.samples]);
  if (a.channels == 1) return corrupt_channel<Law>(a, runs, next, schedule, 0, out);
  if (a.channels == 3) {  // all three before any is stored, so that whole vectors are
    alignas(64) float value[3][kBlock];
    for (int64_t c = 0; c < 3; ++c) corrupt_channel<Law>(a, runs, next, schedule, c, value[c]);
    for (int64_t i = 0; i < runs.values; ++i) {
      for (int64_t c = 0; c < 3; ++c) store(out[3 * i + c], value[c][i]);
    }
    return;
  }
  alignas(64) T value[kBlock];
  for (int64_t c = 0; c < a.channels; ++c) {
    corrupt_channel<Law>(a, runs, next, schedule, c, value);
    for (int64_t i = 0; i < runs.values; ++i) out[i * a.channels + c] = value[i];
  }
}

template <class Law, class T>
void corrupt_range(const CorruptPatchesArgs& a, int64_t begin, int64_t end) {
  Runs runs[2] = {Runs(a, begin), Runs(a, begin)};
  for (int64_t at = begin; at < end; ++at) {
    Runs& next = runs[(at + 1 - begin) % 2];
    if (at + 1 < end) next = Runs(a, at + 1);
    corrupt_item<Law, T>(a, runs[(at - begin) % 2], next);
  }
}

template <class T>
void corrupt_of_type(const CorruptPatchesArgs& a, int64_t begin, int64_t end) {
  a.grid ? corrupt_range<Grid, T>(a, begin, end) : corrupt_range<Gaussian, T>(a, begin, end);
}

}  // namespace

void NIMFAST_LEVEL::corrupt_patches(const CorruptPatchesArgs& args, int64_t begin, int64_t end) {
  switch (args.out_type) {
    case ScalarType::kFloat32: return corrupt_of_type<float>(args, begin, end);
    case ScalarType::kBFloat16: return corrupt_of_type<BFloat16>(args, begin, end);
    case ScalarType::kFloat16: return corrupt_of_type<Float16>(args, begin, end);
  }
}

}  // namespace nimfast
