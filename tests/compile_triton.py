# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for one NVIDIA architecture, without a GPU: compile_triton.py 90"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nimfast.ops import corrupt, votes  # noqa: F401 - registers; the modules are fetched by name below

TYPES = ("fp32", "bf16", "fp16")


def build(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, int], target: GPUTarget
) -> str:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
    )
    return str(
        triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    )


def main(architecture: int) -> None:
    target = GPUTarget("cuda", architecture, 32)
    modules = {name: sys.modules[f"nimfast.ops.{name}"] for name in ("corrupt", "votes")}
    integers = dict.fromkeys(("image_stride", "samples", "values", "plane"), "i32")
    for kind in TYPES:
        types = {
            "images": "*fp32",
            "keys": "*i64",
            "first": "*i64",
            "sigma": "*fp32",
            "scale": "*fp32",
        }
        types |= {"shift": "*fp32", "out": f"*{kind}", **integers}
        text = build(modules["corrupt"]._kernel, types, {"QUADS": 256, "HARDWARE": True}, target)
        print("compiled corrupt", kind, len(text.splitlines()))
        types = {"logits": f"*{kind}", "counts": "*i64", "index": "*i64", "valid": "*i64"}
        types |= dict.fromkeys(("rows", "rows_per_slot", "classes", "groups"), "i32")
        text = build(modules["votes"]._kernel, types, {"ROWS": 4, "CLASSES": 1024}, target)
        print("compiled votes", kind, len(text.splitlines()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
