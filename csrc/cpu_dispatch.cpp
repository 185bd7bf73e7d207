// SPDX-License-Identifier: Apache-2.0
#include "cpu_dispatch.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

namespace nimfast {
namespace {

#define NIMFAST_MEMBER(name, Args) void (*name)(const Args& args, int64_t begin, int64_t end);
#define NIMFAST_PORTABLE(name, Args) portable::name,
#define NIMFAST_V2(name, Args) x86_64_v2::name,
#define NIMFAST_V3(name, Args) x86_64_v3::name,
#define NIMFAST_V4(name, Args) x86_64_v4::name,

struct Level {
  const char* name;
  bool (*supported)();
  struct {
    NIMFAST_CPU_OPS(NIMFAST_MEMBER)
  } kernels;
};

// Best first. The last one runs everywhere.
const Level kLevels[] = {
#ifdef NIMFAST_X86_LEVELS
    {"x86-64-v4",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     },
     {NIMFAST_CPU_OPS(NIMFAST_V4)}},
    {"x86-64-v3",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
     },
     {NIMFAST_CPU_OPS(NIMFAST_V3)}},
    {"x86-64-v2", [] { return __builtin_cpu_supports("sse4.2") != 0; }, {NIMFAST_CPU_OPS(NIMFAST_V2)}},
#endif
    {"portable", [] { return true; }, {NIMFAST_CPU_OPS(NIMFAST_PORTABLE)}},
};

const Level* best_level() {
  for (const Level& level : kLevels) {
    if (level.supported()) return &level;
  }
  return nullptr;  // not reached: the last level is always supported
}

std::atomic<const Level*> current{best_level()};

template <class Args>
struct Work {
  const Args& args;
  void (*kernel)(const Args& args, int64_t begin, int64_t end);
  int64_t items;
  int64_t parts;

  void part(int64_t p) const { kernel(args, items * p / parts, items * (p + 1) / parts); }
};

// The OpenMP runtime that torch has loaded, if any: its threads already wait for work, so a small batch is worth
// splitting, and there is no second set of threads beside them. Looked up by name, because an extension linked
// against OpenMP would bring a runtime of its own.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*threads)();
};

const OpenMP* openmp() {
  static const OpenMP found{
      reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<decltype(OpenMP::thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
      reinterpret_cast<decltype(OpenMP::threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  return found.parallel && found.thread_number && found.threads ? &found : nullptr;
}

template <class Args>
void run_share(void* data) {
  const auto& work = *static_cast<const Work<Args>*>(data);
  // The runtime may give fewer threads than were asked for.
  for (int64_t p = openmp()->thread_number(); p < work.parts; p += openmp()->threads()) work.part(p);
}

template <class Args>
void split(const Args& args, void (*kernel)(const Args&, int64_t, int64_t), int64_t items, int64_t worth_a_thread,
           int threads) {
  Work<Args> work{args, kernel, items, std::clamp<int64_t>(items / worth_a_thread, 1, std::max(threads, 1))};
  if (work.parts == 1) return work.part(0);  // always so in a forked DataLoader worker, where OpenMP must not be used
  if (openmp()) return openmp()->parallel(run_share<Args>, &work, static_cast<unsigned>(work.parts), 0);
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(work.parts - 1));
  for (int64_t p = 1; p < work.parts; ++p) {
    try {
      others.emplace_back([&work, p] { work.part(p); });
    } catch (const std::system_error&) {  // the system has no thread to give: slower, still right
      work.part(p);
    }
  }
  work.part(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

#define NIMFAST_DEFINE(name, Args)                                                                 \
  void name##_cpu(const Args& args, int threads) {                                                 \
    split(args, current.load()->kernels.name, args.items(), args.items_worth_a_thread(), threads); \
  }
NIMFAST_CPU_OPS(NIMFAST_DEFINE)
#undef NIMFAST_DEFINE

std::string cpu_level() { return current.load()->name; }

void set_cpu_level(const std::string& name) {
  for (const Level& level : kLevels) {
    if (level.name == name) {
      if (!level.supported()) throw std::invalid_argument("this processor does not run " + name);
      current.store(&level);
      return;
    }
  }
  throw std::invalid_argument("this build has no CPU level " + name);
}

}  // namespace nimfast
