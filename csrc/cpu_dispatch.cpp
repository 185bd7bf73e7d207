// SPDX-License-Identifier: Apache-2.0
#include "cpu_dispatch.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_levels.h"
#include "philox.h"

namespace nimfast {
namespace {

struct Level {
  const char* name;
  CorruptKernel corrupt;
  VotesKernel votes;
  bool (*supported)();
};

// Best first. The last one runs everywhere.
const Level kLevels[] = {
#ifdef NIMFAST_X86_LEVELS
    {"x86-64-v4", x86_64_v4::corrupt, x86_64_v4::votes,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     }},
    {"x86-64-v3", x86_64_v3::corrupt, x86_64_v3::votes,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
     }},
    {"x86-64-v2", x86_64_v2::corrupt, x86_64_v2::votes, [] { return __builtin_cpu_supports("sse4.2") != 0; }},
#endif
    {"portable", portable::corrupt, portable::votes, [] { return true; }},
};

const Level* best_level() {
  for (const Level& level : kLevels) {
    if (level.supported()) return &level;
  }
  return nullptr;  // not reached: the last level is always supported
}

std::atomic<const Level*> current{best_level()};

// Threads live for one call: starting one costs about 15 us, less than 1% of the work that is worth splitting, and no
// pool means nothing to break after fork (DataLoader workers) and no second set of waiting threads beside torch's.
template <class Args, class Kernel>
void split(const Args& args, Kernel kernel, int64_t items, int64_t least_per_thread, int threads) {
  const int64_t parts = std::clamp<int64_t>(items / least_per_thread, 1, std::max(threads, 1));
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t p = 1; p < parts; ++p) {
    const int64_t begin = items * p / parts, end = items * (p + 1) / parts;
    try {
      others.emplace_back(kernel, std::cref(args), begin, end);
    } catch (const std::system_error&) {  // the system has no thread to give: slower, still right
      kernel(args, begin, end);
    }
  }
  kernel(args, 0, items / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace

int64_t corrupt_items(const CorruptArgs& args) {
  const int64_t values = args.channels * args.plane, straddle = values % 4 == 0 ? 0 : 3;
  return args.images_count * args.samples * ((values + straddle + kBlock - 1) / kBlock);
}

void corrupt_cpu(const CorruptArgs& args, int threads) {
  split(args, current.load()->corrupt, corrupt_items(args), 256, threads);
}

void votes_cpu(const VotesArgs& args, int threads) {
  const int64_t rows_worth_a_thread = std::max<int64_t>(1, (1 << 18) / args.classes);
  split(args, current.load()->votes, args.slots * args.rows_per_slot, rows_worth_a_thread, threads);
}

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
