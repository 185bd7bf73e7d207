# SPDX-License-Identifier: Apache-2.0
# The CPU kernels, compiled once per instruction set; csrc/cpu_dispatch.cpp chooses at run time.
# Sets NIMFAST_CPU_OBJECTS and NIMFAST_CPU_DEFINITIONS.

# No contraction, no errno, no traps: what is fused is written out (madd in normal.h), the rest may vectorise.
set(NIMFAST_KERNEL_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi
  -Wno-uninitialized) # GCC 12 warns of its own header: _mm512_undefined_epi32 is meant to be undefined

set(NIMFAST_CPU_SOURCES # the operations of csrc/cpu_ops.h
  csrc/ascend.cpp csrc/attention.cpp csrc/corrupt.cpp csrc/corrupt_patches.cpp csrc/layer_norm.cpp csrc/linear.cpp
  csrc/mask_tokens.cpp csrc/random_masks.cpp csrc/recon_loss.cpp csrc/transformer_block.cpp csrc/vote_loss.cpp
  csrc/votes.cpp)

function(nimfast_add_level level sources)
  add_library(nimfast_${level} OBJECT ${sources})
  target_compile_definitions(nimfast_${level} PRIVATE NIMFAST_LEVEL=${level})
  target_compile_options(nimfast_${level} PRIVATE ${NIMFAST_KERNEL_FLAGS} ${ARGN})
  set(NIMFAST_CPU_OBJECTS ${NIMFAST_CPU_OBJECTS} $<TARGET_OBJECTS:nimfast_${level}> PARENT_SCOPE)
endfunction()

nimfast_add_level(portable "${NIMFAST_CPU_SOURCES}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  nimfast_add_level(x86_64_v2 "${NIMFAST_CPU_SOURCES}" -march=x86-64-v2)
  nimfast_add_level(x86_64_v3 "${NIMFAST_CPU_SOURCES}" -march=x86-64-v3)
  nimfast_add_level(x86_64_v4 "${NIMFAST_CPU_SOURCES}" -march=x86-64-v4 -mprefer-vector-width=512)
  nimfast_add_level(x86_64_v4_bf16
    "csrc/attention.cpp;csrc/corrupt.cpp;csrc/corrupt_patches.cpp;csrc/layer_norm.cpp;csrc/linear.cpp;csrc/transformer_block.cpp"
    -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
  set(NIMFAST_CPU_DEFINITIONS NIMFAST_X86_LEVELS)
endif()
