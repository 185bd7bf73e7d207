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
#define NIMFAST_V4_BF16(name, Args) x86_64_v4_bf16::name,

struct Level {
  const char* name;
  bool (*supported)();
  struct {
    NIMFAST_CPU_OPS(NIMFAST_MEMBER)
  } kernels;
};

#ifdef NIMFAST_X86_LEVELS
bool supports_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first. The last one runs everywhere.
const Level kLevels[] = {
#ifdef NIMFAST_X86_LEVELS
    {"x86-64-v4-bf16",
     [] { return supports_v4() && __builtin_cpu_supports("avx512bf16"); },
     {NIMFAST_CPU_OPS(NIMFAST_V4_BF16)}},
    {"x86-64-v4", supports_v4, {NIMFAST_CPU_OPS(NIMFAST_V4)}},
    {"x86-64-v3",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
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
  std::atomic<int64_t> next{0};

  // Threads take parts as they get through them: cores differ in speed, and other programs use them too.
  void share() {
    for (int64_t p = next.fetch_add(1); p < parts; p = next.fetch_add(1)) {
      kernel(args, items * p / parts, items * (p + 1) / parts);
    }
  }
};

constexpr int kPartsPerThread = 32;

// The OpenMP runtime that torch has loaded, if any: its threads already wait for work, so a small batch is worth
// splitting, and there is no second set of threads beside them. Looked up by name, because an extension linked
// against OpenMP would bring a runtime of its own.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

Parallel openmp() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

template <class Args>
void run_share(void* work) {
  static_cast<Work<Args>*>(work)->share();
}

template <class Args>
void split(const Args& args, void (*kernel)(const Args&, int64_t, int64_t), int64_t items, int64_t worth_a_thread,
           int threads) {
  const int64_t wanted = std::clamp<int64_t>(items / worth_a_thread, 1, std::max(threads, 1));
  if (wanted == 1) return kernel(args, 0, items);  // always so in a DataLoader worker, where OpenMP must not be used
  Work<Args> work{args, kernel, items, std::min(items, wanted * kPartsPerThread)};
  if (openmp()) return openmp()(run_share<Args>, &work, static_cast<unsigned>(wanted), 0);
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(wanted - 1));
  for (int64_t i = 1; i < wanted; ++i) {
    try {
      others.emplace_back([&work] { work.share(); });
    } catch (const std::system_error&) {  // the system has no thread to give: slower, still right
      break;
    }
  }
  work.share();
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
