// SPDX-License-Identifier: Apache-2.0
// Small functions are forced inline: the CPU files are compiled once per instruction set, and an out-of-line copy made
// for a newer processor could be the one the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define NIMFAST_HD __host__ __device__ __forceinline__
#else
#define NIMFAST_HD inline __attribute__((always_inline))
#endif
