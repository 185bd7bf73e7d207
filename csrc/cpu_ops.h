// SPDX-License-Identifier: Apache-2.0
// The list of CPU operations. Each is compiled once per instruction set, as NIMFAST_LEVEL::name(args, begin, end) over
// a range of its items; cpu_dispatch.cpp picks the level and splits the items among threads.
#pragma once
#include "ascend.h"
#include "attention.h"
#include "corrupt.h"
#include "corrupt_patches.h"
#include "layer_norm.h"
#include "linear.h"
#include "mask_tokens.h"
#include "random_masks.h"
#include "recon_loss.h"
#include "transformer_block.h"
#include "vote_loss.h"
#include "votes.h"

// X(name, type of its arguments); the type says how many items() there are and how many are worth a thread.
#define NIMFAST_CPU_OPS(X)                            \
  X(ascend, AscendArgs)                               \
  X(attention, AttentionArgs)                         \
  X(attention_backward, AttentionArgs)                \
  X(corrupt, CorruptArgs)                             \
  X(corrupt_patches, CorruptPatchesArgs)              \
  X(layer_norm, LayerNormArgs)                        \
  X(layer_norm_backward, LayerNormBackwardArgs)       \
  X(linear, LinearArgs)                               \
  X(mask_tokens, MaskTokensArgs)                      \
  X(mask_tokens_backward, MaskTokensBackwardArgs)     \
  X(pack, PackArgs)                                   \
  X(random_masks, RandomMasksArgs)                    \
  X(recon_loss, ReconLossArgs)                        \
  X(take_rows, TakeRowsArgs)                          \
  X(transformer_block, TransformerBlockArgs)          \
  X(transformer_block_backward, TransformerBlockArgs) \
  X(vote_loss, VoteLossArgs)                          \
  X(votes, VotesArgs)                                 \
  X(weight_gradient, WeightGradientArgs)

namespace nimfast {
#define NIMFAST_DECLARE(name, Args) void name(const Args& args, int64_t begin, int64_t end);
namespace portable {
NIMFAST_CPU_OPS(NIMFAST_DECLARE)
}
namespace x86_64_v2 {
NIMFAST_CPU_OPS(NIMFAST_DECLARE)
}
namespace x86_64_v3 {
NIMFAST_CPU_OPS(NIMFAST_DECLARE)
}
namespace x86_64_v4 {
NIMFAST_CPU_OPS(NIMFAST_DECLARE)
}
// x86-64-v4 and AVX512_BF16: the operations that have a kernel of their own for it, the others as above.
namespace x86_64_v4_bf16 {
using namespace x86_64_v4;
NIMFAST_DECLARE(attention, AttentionArgs)
NIMFAST_DECLARE(attention_backward, AttentionArgs)
NIMFAST_DECLARE(corrupt, CorruptArgs)
NIMFAST_DECLARE(corrupt_patches, CorruptPatchesArgs)
NIMFAST_DECLARE(layer_norm, LayerNormArgs)
NIMFAST_DECLARE(layer_norm_backward, LayerNormBackwardArgs)
NIMFAST_DECLARE(linear, LinearArgs)
NIMFAST_DECLARE(pack, PackArgs)
NIMFAST_DECLARE(take_rows, TakeRowsArgs)
NIMFAST_DECLARE(transformer_block, TransformerBlockArgs)
NIMFAST_DECLARE(transformer_block_backward, TransformerBlockArgs)
NIMFAST_DECLARE(weight_gradient, WeightGradientArgs)
}  // namespace x86_64_v4_bf16
#undef NIMFAST_DECLARE
}  // namespace nimfast
