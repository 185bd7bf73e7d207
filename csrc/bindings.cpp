// SPDX-License-Identifier: Apache-2.0
// The Python module `_nimfast`: raw addresses in, no torch. nimfast/ops checks every argument before it calls; nothing
// here is a public interface.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "cpu_dispatch.h"
#include "cpu_memory.h"
#ifdef NIMFAST_WITH_CUDA
#include "cuda_support.h"
#endif

namespace py = pybind11;
using namespace nimfast;

namespace {

// What Python passes for a member: pointers as addresses, enumerators as their codes, the rest as it is.
template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, uintptr_t, std::conditional_t<std::is_enum_v<T>, int, T>>;

template <class T>
T received(Wire<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

// Defines `name`, which takes the members of Args in the order given, then the number of threads (CPU) or the address
// of the stream (CUDA).
template <class Args, class Place, class... T>
void define(py::module_& m, const char* name, void (*launch)(const Args&, Place), T Args::*... members) {
  m.def(name, [launch, members...](Wire<T>... values, Wire<Place> place) {
    Args args{};
    ((args.*members = received<T>(values)), ...);
    py::gil_scoped_release release;
    launch(args, received<Place>(place));
  });
}

template <class Place>
void define_ascend(py::module_& m, const char* name, void (*launch)(const AscendArgs&, Place)) {
  using A = AscendArgs;
  define(m, name, launch, &A::x, &A::origin, &A::gradient, &A::type, &A::previous, &A::step, &A::eps, &A::out,
         &A::images, &A::values, &A::momentum, &A::rest, &A::l2);
}

// Of the CPU alone: on a GPU, torch's own attention serves.
void define_attention(py::module_& m) {
  using A = AttentionArgs;
  const auto define_one = [&m](const char* name, void (*launch)(const A&, int)) {
    define(m, name, launch, &A::gradient, &A::qkv, &A::out, &A::batch_stride, &A::token_stride, &A::batch, &A::tokens,
           &A::heads, &A::head_size, &A::scale, &A::type);
  };
  define_one("attention_cpu", attention_cpu);
  define_one("attention_backward_cpu", attention_backward_cpu);
}

template <class Place>
void define_corrupt(py::module_& m, const char* name, void (*launch)(const CorruptArgs&, Place)) {
  using A = CorruptArgs;
  define(m, name, launch, &A::images, &A::image_stride, &A::keys, &A::first, &A::sigma, &A::grid, &A::scale, &A::shift,
         &A::out, &A::out_type, &A::images_count, &A::samples, &A::channels, &A::plane);
}

template <class Place>
void define_recon_loss(py::module_& m, const char* name, void (*launch)(const ReconLossArgs&, Place)) {
  using A = ReconLossArgs;
  define(m, name, launch, &A::prediction, &A::prediction_stride, &A::images, &A::image_stride, &A::mask, &A::scale,
         &A::shift, &A::weight, &A::losses, &A::gradient, &A::type, &A::images_count, &A::samples, &A::channels,
         &A::height, &A::width, &A::patch, &A::norm_pix, &A::power);
}

template <class Place>
void define_vote_loss(py::module_& m, const char* name, void (*launch)(const VoteLossArgs&, Place)) {
  using A = VoteLossArgs;
  define(m, name, launch, &A::logits, &A::type, &A::labels, &A::targets, &A::loss, &A::missed, &A::gradient, &A::images,
         &A::samples, &A::classes, &A::kind);
}

template <class Place>
void define_corrupt_patches(py::module_& m, const char* name, void (*launch)(const CorruptPatchesArgs&, Place)) {
  using A = CorruptPatchesArgs;
  define(m, name, launch, &A::images, &A::image_stride, &A::keys, &A::first, &A::sigma, &A::grid, &A::scale, &A::shift,
         &A::kept, &A::out, &A::out_type, &A::images_count, &A::samples, &A::channels, &A::height, &A::width, &A::patch,
         &A::kept_count);
}

template <class Place>
void define_votes(py::module_& m, const char* name, void (*launch)(const VotesArgs&, Place)) {
  using A = VotesArgs;
  define(m, name, launch, &A::logits, &A::type, &A::counts, &A::index, &A::valid, &A::slots, &A::rows_per_slot,
         &A::classes, &A::groups);
}

// Of the CPU alone: on a GPU, torch's own serve.
void define_layers(py::module_& m) {
  using T = TakeRowsArgs;
  define(m, "take_rows_cpu", take_rows_cpu, &T::kept, &T::tokens, &T::x, &T::gain, &T::out, &T::rows, &T::width);
  using N = LayerNormArgs;
  define(m, "layer_norm_cpu", layer_norm_cpu, &N::kept, &N::tokens, &N::x, &N::weight, &N::bias, &N::eps, &N::out,
         &N::means, &N::scales, &N::rows, &N::width);
  using B = LayerNormBackwardArgs;
  define(m, "layer_norm_backward_cpu", layer_norm_backward_cpu, &B::kept, &B::tokens, &B::gradient, &B::x, &B::weight,
         &B::means, &B::scales, &B::residual, &B::out, &B::sums, &B::rows, &B::width);
  using P = PackArgs;
  define(m, "pack_cpu", pack_cpu, &P::weight, &P::out, &P::depth, &P::width, &P::across, &P::type);
  using L = LinearArgs;
  define(m, "linear_cpu", linear_cpu, &L::type, &L::x, &L::weight, &L::bias, &L::after, &L::other, &L::out, &L::slope,
         &L::kept, &L::tokens, &L::gain, &L::rows, &L::depth, &L::width);
  using W = WeightGradientArgs;
  define(m, "weight_gradient_cpu", weight_gradient_cpu, &W::gradient, &W::x, &W::weight, &W::bias, &W::rows, &W::depth,
         &W::width);
}

// Of the CPU alone. Layers are frozen, so they are described once, and calls take the description's address.
void define_transformer_block(py::module_& m) {
  const auto floats = [](uintptr_t address) { return received<const float*>(address); };
  py::class_<FrozenNorm>(m, "FrozenNorm").def(py::init([floats](uintptr_t weight, uintptr_t bias, float eps) {
    return FrozenNorm{floats(weight), floats(bias), eps};
  }));
  using L = FrozenLinear;
  py::class_<L>(m, "FrozenLinear")
      .def(py::init([floats](uintptr_t words, uintptr_t bias, uintptr_t across, int64_t depth, int64_t width) {
        return L{floats(words), floats(bias), floats(across), depth, width};
      }));
  using N = FrozenNorm;
  py::class_<BlockLayers>(m, "BlockLayers")
      .def(py::init([](const N& norm1, const L& qkv, const L& proj, const N& norm2, const L& fc1, const L& fc2,
                       int64_t heads,
                       float scale) { return BlockLayers{norm1, qkv, proj, norm2, fc1, fc2, heads, scale}; }))
      .def_property_readonly("address", [](const BlockLayers& layers) { return reinterpret_cast<uintptr_t>(&layers); });
  using A = TransformerBlockArgs;
  const auto define_one = [&m](const char* name, void (*launch)(const A&, int)) {
    define(m, name, launch, &A::layers, &A::gradient, &A::x, &A::out, &A::qkv, &A::middle, &A::slope, &A::images,
           &A::tokens, &A::type);
  };
  define_one("transformer_block_cpu", transformer_block_cpu);
  define_one("transformer_block_backward_cpu", transformer_block_backward_cpu);
}

// Of the CPU alone: on a GPU, Triton serves these.
void define_masks(py::module_& m) {
  using R = RandomMasksArgs;
  define(m, "random_masks_cpu", random_masks_cpu, &R::keys, &R::first, &R::kept, &R::restore, &R::mask,
         &R::images_count, &R::samples, &R::patches, &R::kept_count);
  using T = MaskTokensArgs;
  define(m, "mask_tokens_cpu", mask_tokens_cpu, &T::tokens, &T::mask_token, &T::mask, &T::out, &T::type, &T::rows,
         &T::columns);
  using G = MaskTokensBackwardArgs;
  define(m, "mask_tokens_backward_cpu", mask_tokens_backward_cpu, &G::gradient, &G::mask, &G::out, &G::partial,
         &G::type, &G::rows, &G::rows_per_part, &G::columns);
}

// A Block is what torch.frombuffer makes a tensor of; the tensor holds it and lets it go.
void define_memory(py::module_& m) {
  py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](Block& block) {
    return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
  });
  m.def("idle_bytes", &idle_bytes);
  m.def("release_memory", &release_memory);
}

}  // namespace

PYBIND11_MODULE(_nimfast, m) {
  m.doc() = "Kernels of nimfast; called through nimfast.ops.";
  m.attr("version") = NIMFAST_VERSION;
  m.def("cpu_level", &cpu_level);
  m.def("set_cpu_level", &set_cpu_level);
  define_memory(m);
  m.def("image_keys", [](uint64_t seed, uint32_t stream, uintptr_t indices, uintptr_t keys, int64_t count) {
    image_keys(seed, stream, received<const uint64_t*>(indices), received<uint64_t*>(keys), count);
  });
  define_ascend(m, "ascend_cpu", ascend_cpu);
  define_attention(m);
  define_corrupt(m, "corrupt_cpu", corrupt_cpu);
  define_corrupt_patches(m, "corrupt_patches_cpu", corrupt_patches_cpu);
  define_recon_loss(m, "recon_loss_cpu", recon_loss_cpu);
  define_vote_loss(m, "vote_loss_cpu", vote_loss_cpu);
  define_votes(m, "votes_cpu", votes_cpu);
  define_layers(m);
  define_transformer_block(m);
  define_masks(m);
#ifdef NIMFAST_WITH_CUDA
  m.attr("cuda_architectures") = NIMFAST_CUDA_ARCHITECTURES;
  m.def("cuda_problem", &cuda_problem);
  define_corrupt(m, "corrupt_cuda", corrupt_cuda);
  define_corrupt_patches(m, "corrupt_patches_cuda", corrupt_patches_cuda);
  define_votes(m, "votes_cuda", votes_cuda);
#else
  m.attr("cuda_architectures") = "";
#endif
}
