// SPDX-License-Identifier: Apache-2.0
// The Python module `_nimfast`: raw addresses in, nothing allocated, no torch. nimfast/ops checks every argument before
// it calls; nothing here is a public interface.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_dispatch.h"
#ifdef NIMFAST_WITH_CUDA
#include "cuda_support.h"
#endif

namespace py = pybind11;
using namespace nimfast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `place` is the number of threads on the CPU and the address of the stream on CUDA.
template <auto kLaunch, class Place>
void corrupt(uintptr_t images, int64_t image_stride, uintptr_t keys, uintptr_t first, uintptr_t sigma, uintptr_t scale,
             uintptr_t shift, uintptr_t out, int out_type, int64_t images_count, int64_t samples, int64_t channels,
             int64_t plane, Place place) {
  CorruptArgs args{};
  args.images = pointer<const float>(images);
  args.keys = pointer<const uint64_t>(keys);
  args.first = pointer<const int64_t>(first);
  args.sigma = pointer<const float>(sigma);
  args.scale = pointer<const float>(scale);
  args.shift = pointer<const float>(shift);
  args.out = pointer<void>(out);
  args.image_stride = image_stride;
  args.images_count = images_count;
  args.samples = samples;
  args.channels = channels;
  args.plane = plane;
  args.out_type = static_cast<ScalarType>(out_type);
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Place, int>) {
    kLaunch(args, place);
  } else {
    kLaunch(args, pointer<void>(place));
  }
}

template <auto kLaunch, class Place>
void votes(uintptr_t logits, int type, uintptr_t counts, uintptr_t index, uintptr_t valid, int64_t slots,
           int64_t rows_per_slot, int64_t classes, int64_t groups, Place place) {
  VotesArgs args{};
  args.logits = pointer<const void>(logits);
  args.counts = pointer<int64_t>(counts);
  args.index = pointer<const int64_t>(index);
  args.valid = pointer<const int64_t>(valid);
  args.slots = slots;
  args.rows_per_slot = rows_per_slot;
  args.classes = classes;
  args.groups = groups;
  args.type = static_cast<ScalarType>(type);
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Place, int>) {
    kLaunch(args, place);
  } else {
    kLaunch(args, pointer<void>(place));
  }
}

}  // namespace

PYBIND11_MODULE(_nimfast, m) {
  m.doc() = "Kernels of nimfast; called through nimfast.ops.";
  m.attr("version") = NIMFAST_VERSION;
  m.def("cpu_level", &cpu_level);
  m.def("set_cpu_level", &set_cpu_level);
  m.def("corrupt_cpu", &corrupt<corrupt_cpu, int>);
  m.def("votes_cpu", &votes<votes_cpu, int>);
#ifdef NIMFAST_WITH_CUDA
  m.attr("cuda_architectures") = NIMFAST_CUDA_ARCHITECTURES;
  m.def("cuda_problem", &cuda_problem);
  m.def("corrupt_cuda", &corrupt<corrupt_cuda, uintptr_t>);
  m.def("votes_cuda", &votes<votes_cuda, uintptr_t>);
#else
  m.attr("cuda_architectures") = "";
#endif
}
