// SPDX-License-Identifier: Apache-2.0
// vote_loss: mean attack loss of the S draws of every image, draws misclassified, and the gradient of the mean.
//   cross-entropy: log(sum exp z) - z_y
//   DLR:           -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12)
//   targeted DLR:  -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)
// with z_(1) >= z_(2) >= ... A row that holds NaN or an infinity is misclassified, its loss and gradient are NaN.
// There is no CUDA C++ of it: a row is read once and reduced, for which Triton's code is as good.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace nimfast {

enum class VoteLoss : int { kCrossEntropy = 0, kDlr = 1, kTargetedDlr = 2 };  // the codes that Python passes

struct VoteLossArgs {
  const void* logits;      // [N * S, K]
  const int64_t* labels;   // [N]; one that is no class gives NaN
  const int64_t* targets;  // [N], or null for losses without
  float* loss;             // [N]
  int64_t* missed;         // [N]
  float* gradient;         // [N * S, K] of loss with respect to logits, or null
  int64_t images;          // N
  int64_t samples;         // S
  int64_t classes;         // K
  VoteLoss kind;
  ScalarType type;

  int64_t items() const { return images; }
  int64_t items_worth_a_thread() const { return 1 + (1 << 14) / (samples * classes); }
};

}  // namespace nimfast
