# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for one NVIDIA architecture, without a GPU: compile_triton.py 90"""

import importlib
import sys
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# An entry: operation, kernel in nimfast/ops/<operation>.py, types of its arguments, constants.
Entry = tuple[str, str, dict[str, str], dict[str, int]]


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def kernels() -> Iterator[Entry]:
    """Every kernel, in every type it reads or writes."""
    for kind in ("fp32", "bf16", "fp16"):
        noise = {"images": "*fp32", "keys": "*i64", "first": "*i64", "sigma": "*fp32"}
        noise |= {"scale": "*fp32", "shift": "*fp32", "out": f"*{kind}"}
        yield (
            "corrupt",
            "_kernel",
            noise | integers("image_stride", "samples", "values", "plane"),
            {"QUADS": 256, "HARDWARE": True},
        )
        for patch, groups in ((16, 128), (14, 256)):  # whole quads; pixel by pixel
            yield (
                "corrupt_patches",
                "_kernel",
                noise
                | {"kept": "*i64"}
                | integers("image_stride", "samples", "values", "width", "plane", "grid_width")
                | integers("patches", "kept_count"),
                {"PATCH": patch, "CHANNELS": 3, "GATHER": True, "QUADS": patch == 16}
                | {"GROUPS": groups, "HARDWARE": True},
            )
        yield (
            "votes",
            "_kernel",
            {"logits": f"*{kind}", "counts": "*i64", "index": "*i64", "valid": "*i64"}
            | integers("rows", "rows_per_slot", "classes", "groups"),
            {"ROWS": 4, "CLASSES": 1024},
        )


def main(architecture: int) -> None:
    target = GPUTarget("cuda", architecture, 32)
    for operation, name, types, constants in kernels():
        kernel = getattr(importlib.import_module(f"nimfast.ops.{operation}"), name)
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        places = {(kernel.arg_names.index(k),): value for k, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        built = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        print("compiled", operation, name, len(str(built.asm["ptx"]).splitlines()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
