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
        loss = {"prediction": f"*{kind}", "images": "*fp32", "mask": "*u8", "scale": "*fp32"}
        loss |= {"shift": "*fp32", "weight": "*fp32", "losses": "*fp32", "gradient": f"*{kind}"}
        strides = {"prediction_stride": "i64", "image_stride": "i64"}
        for p in (1, 2):
            yield (
                "recon_loss",
                "_kernel",
                loss | strides | integers("samples", "height", "width"),
                {"PATCH": 16, "CHANNELS": 3, "NORM_PIX": True, "P": p, "MASKED": True}
                | {"GRADIENT": True, "BLOCK": 1024},
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
