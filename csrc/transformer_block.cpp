// SPDX-License-Identifier: Apache-2.0
// A frozen transformer block on the CPU. Compiled once per instruction set; cpu_dispatch.cpp picks one at run time.
#include "transformer_block.h"

#include "cpu_memory.h"
#include "cpu_ops.h"
#include "norm_rows.h"
#include "products.h"

namespace nimfast {
namespace {

// Room of the calling thread, handed out piece by piece.
class Arena {
 public:
  explicit Arena(int64_t bytes) : next_(thread_scratch(bytes / 4 + 16 * 8, Scratch::kCaller)) {}

  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64) / 4;
    return place;
  }

 private:
  float* next_;
};

template <class T>
AttentionArgs attention_of(const TransformerBlockArgs& a, const T* qkv, T* out, int64_t images) {
  const BlockLayers& l = *a.layers;
  AttentionArgs args{};
  args.qkv = qkv;
  args.out = out;
  args.token_stride = l.qkv.width;
  args.batch_stride = a.tokens * l.qkv.width;
  args.batch = images;
  args.tokens = a.tokens;
  args.heads = l.heads;
  args.head_size = l.proj.depth / l.heads;
  args.scale = l.scale;
  args.type = a.type;
  return args;
}

Packed forth(const FrozenLinear& layer) { return {layer.words, layer.depth, layer.width}; }
Packed back(const FrozenLinear& layer) { return {layer.across, layer.width, layer.depth}; }

// kKeep: what a gradient needs.
template <class T, bool kKeep>
void forward(const TransformerBlockArgs& a, int64_t first, int64_t images) {
  const BlockLayers& l = *a.layers;
  const int64_t width = l.fc2.width, inner = l.proj.depth, hidden = l.fc1.width;
  const int64_t skipped = first * a.tokens, rows = images * a.tokens;
  const T* x = static_cast<const T*>(a.x) + skipped * width;
  T* out = static_cast<T*>(a.out) + skipped * width;
  T* kept_middle = static_cast<T*>(a.middle) + (kKeep ? skipped * width : 0);
  T* slopes = static_cast<T*>(a.slope) + (kKeep ? skipped * hidden : 0);

  Arena arena(rows * (width * 4 + (width + 3 * inner + inner + hidden) * static_cast<int64_t>(sizeof(T))));
  float* middle = arena.take<float>(rows * width);
  T* seen = arena.take<T>(rows * width);
  T* mixed = arena.take<T>(rows * inner);
  T* active = arena.take<T>(rows * hidden);
  T* qkv = kKeep ? static_cast<T*>(a.qkv) + skipped * 3 * inner : arena.take<T>(rows * 3 * inner);

  // By value: what a pointer leads to is read again after every store.
  const float *qkv_bias = l.qkv.bias, *proj_bias = l.proj.bias, *fc1_bias = l.fc1.bias, *fc2_bias = l.fc2.bias;
  for (int64_t r = 0; r < rows; ++r) {
    norm_row(x + r * width, l.norm1.weight, l.norm1.bias, l.norm1.eps, width, seen + r * width);
  }
  multiply_rows(seen, width, rows, forth(l.qkv), [&](int64_t row, int64_t column, Floats sum) {
    store_some(qkv + row * 3 * inner + column, sum + load_lanes(qkv_bias + column), 3 * inner - column);
  });
  NIMFAST_LEVEL::attention(attention_of(a, qkv, mixed, images), 0, images * l.heads);
  multiply_rows(mixed, inner, rows, forth(l.proj), [&](int64_t row, int64_t column, Floats sum) {
    const int64_t at = row * width + column, left = width - column;
    const Floats value = load_some(x + at, left) + sum + load_lanes(proj_bias + column);
    store_some(middle + at, value, left);
    if constexpr (kKeep) store_some(kept_middle + at, value, left);
  });
  for (int64_t r = 0; r < rows; ++r) {
    norm_row(middle + r * width, l.norm2.weight, l.norm2.bias, l.norm2.eps, width, seen + r * width);
  }
  multiply_rows(seen, width, rows, forth(l.fc1), [&](int64_t row, int64_t column, Floats sum) {
    const int64_t at = row * hidden + column, left = hidden - column;
    Floats slope;
    store_some(active + at, gelu(sum + load_lanes(fc1_bias + column), slope), left);
    if constexpr (kKeep) store_some(slopes + at, slope, left);
  });
  multiply_rows(active, hidden, rows, forth(l.fc2), [&](int64_t row, int64_t column, Floats sum) {
    const int64_t at = row * width + column, left = width - column;
    store_some(out + at, load_some(middle + at, left) + sum + load_lanes(fc2_bias + column), left);
  });
}

// out(place, vector, values left) gets the gradient of x, given `slopes`, that of norm(x), a vector at a time.
template <class T, class Out>
void through_norm(const FrozenNorm& norm, const float* slopes, const T* x, int64_t rows, int64_t width, Out out) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * width;
    norm_row_backward(
        slopes + row, x + row, statistics_of(x + row, width, norm.eps), norm.weight, width,
        [](int64_t, Floats, Floats) {}, [&](int64_t i, Floats change) { out(row + i, change, width - i); });
  }
}

template <class T>
void backward(const TransformerBlockArgs& a, int64_t first, int64_t images) {
  const BlockLayers& l = *a.layers;
  const int64_t width = l.fc2.width, inner = l.proj.depth, hidden = l.fc1.width;
  const int64_t skipped = first * a.tokens, rows = images * a.tokens;
  const T* gradient = static_cast<const T*>(a.gradient) + skipped * width;
  const T* x = static_cast<const T*>(a.x) + skipped * width;
  const T* qkv = static_cast<const T*>(a.qkv) + skipped * 3 * inner;
  const T* middle = static_cast<const T*>(a.middle) + skipped * width;
  const T* slopes = static_cast<const T*>(a.slope) + skipped * hidden;
  T* out = static_cast<T*>(a.out) + skipped * width;

  Arena arena(rows * (2 * width * 4 + (width + 3 * inner + inner + hidden) * static_cast<int64_t>(sizeof(T))));
  float* of_norm = arena.take<float>(rows * width);    // gradients: of what a norm returns,
  float* of_middle = arena.take<float>(rows * width);  // of m,
  T* rounded = arena.take<T>(rows * width);            // the same as products read it,
  T* of_hidden = arena.take<T>(rows * hidden);         // of what GELU gets,
  T* of_mixed = arena.take<T>(rows * inner);           // of what attention returns,
  T* of_qkv = arena.take<T>(rows * 3 * inner);         // and of what it gets
  const auto store_of_norm = [&](int64_t row, int64_t column, Floats sum) {
    store_some(of_norm + row * width + column, sum, width - column);
  };

  multiply_rows(gradient, width, rows, back(l.fc2), [&](int64_t row, int64_t column, Floats sum) {
    const int64_t at = row * hidden + column, left = hidden - column;
    store_some(of_hidden + at, sum * load_some(slopes + at, left), left);
  });
  multiply_rows(of_hidden, hidden, rows, back(l.fc1), store_of_norm);
  through_norm(l.norm2, of_norm, middle, rows, width, [&](int64_t at, Floats change, int64_t left) {
    const Floats sum = load_some(gradient + at, left) + change;
    store_some(of_middle + at, sum, left);
    store_some(rounded + at, sum, left);
  });
  multiply_rows(rounded, width, rows, back(l.proj), [&](int64_t row, int64_t column, Floats sum) {
    store_some(of_mixed + row * inner + column, sum, inner - column);
  });
  AttentionArgs attention = attention_of(a, qkv, of_qkv, images);
  attention.gradient = of_mixed;
  NIMFAST_LEVEL::attention_backward(attention, 0, images * l.heads);
  multiply_rows(of_qkv, 3 * inner, rows, back(l.qkv), store_of_norm);
  through_norm(l.norm1, of_norm, x, rows, width, [&](int64_t at, Floats change, int64_t left) {
    store_some(out + at, load_some(of_middle + at, left) + change, left);
  });
}

template <class Run>
void for_groups(const TransformerBlockArgs& a, int64_t begin, int64_t end, Run run) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * a.images_of_item();
    run(a, first, std::min(a.images_of_item(), a.images - first));
  }
}

}  // namespace

void NIMFAST_LEVEL::transformer_block(const TransformerBlockArgs& a, int64_t begin, int64_t end) {
  const bool floats = a.type == ScalarType::kFloat32;
  if (a.qkv) return for_groups(a, begin, end, floats ? forward<float, true> : forward<BFloat16, true>);
  for_groups(a, begin, end, floats ? forward<float, false> : forward<BFloat16, false>);
}

void NIMFAST_LEVEL::transformer_block_backward(const TransformerBlockArgs& a, int64_t begin, int64_t end) {
  for_groups(a, begin, end, a.type == ScalarType::kFloat32 ? backward<float> : backward<BFloat16>);
}

}  // namespace nimfast
