// SPDX-License-Identifier: Apache-2.0
// Entry points of the CPU kernels, corrupt_cpu(args, threads) and so on: choose the instruction set, split the work
// among threads.
#pragma once
#include <string>

#include "cpu_ops.h"

namespace nimfast {

#define NIMFAST_DECLARE(name, Args) void name##_cpu(const Args& args, int threads);
NIMFAST_CPU_OPS(NIMFAST_DECLARE)
#undef NIMFAST_DECLARE

std::string cpu_level();                       // "x86-64-v4", ..., "portable"
void set_cpu_level(const std::string& level);  // for tests and benchmarks; throws if the build or machine lacks it

}  // namespace nimfast
