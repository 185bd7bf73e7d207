// SPDX-License-Identifier: Apache-2.0
// One set of CPU kernels for each instruction set the build made (NIMFAST_LEVEL names the one being compiled).
#pragma once
#include "corrupt.h"
#include "votes.h"

#define NIMFAST_DECLARE_LEVEL(level)                                 \
  namespace level {                                                  \
  void corrupt(const CorruptArgs& args, int64_t begin, int64_t end); \
  void votes(const VotesArgs& args, int64_t begin, int64_t end);     \
  }

namespace nimfast {
NIMFAST_DECLARE_LEVEL(portable)
NIMFAST_DECLARE_LEVEL(x86_64_v2)
NIMFAST_DECLARE_LEVEL(x86_64_v3)
NIMFAST_DECLARE_LEVEL(x86_64_v4)
}  // namespace nimfast
