# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for one NVIDIA architecture, without a GPU: compile_triton.py 90"""

import importlib
import itertools
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
        noise |= {"thresholds": "*i64", "table": "*i32"} | integers("cell_shift", "count")
        for grid in (False, True):
            yield (
                "corrupt",
                "_kernel",
                noise | integers("image_stride", "samples", "values", "plane"),
                {"QUADS": 256, "GRID": grid, "HARDWARE": True},
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
            "mask_tokens",
            "_kernel",
            {"tokens": f"*{kind}", "mask_token": f"*{kind}", "mask": "*u8", "out": f"*{kind}"}
            | integers("rows", "columns"),
            {"ROWS": 2, "COLUMNS": 1024},
        )
        yield (
            "mask_tokens",
            "_backward_kernel",
            {"gradient": f"*{kind}", "mask": "*u8", "out": f"*{kind}", "partial": "*fp32"}
            | integers("rows", "rows_per_part", "columns"),
            {"ROWS": 2, "COLUMNS": 1024},
        )
        quads_or_pixels = ((16, 128), (14, 256))
        for (patch, groups), grid in itertools.product(quads_or_pixels, (False, True)):
            yield (
                "corrupt_patches",
                "_kernel",
                noise
                | {"kept": "*i64"}
                | integers("image_stride", "samples", "values", "width", "plane", "grid_width")
                | integers("patches", "kept_count"),
                {"PATCH": patch, "CHANNELS": 3, "GATHER": True, "QUADS": patch == 16}
                | {"GROUPS": groups, "GRID": grid, "HARDWARE": True},
            )
        yield (
            "votes",
            "_kernel",
            {"logits": f"*{kind}", "counts": "*i64", "index": "*i64", "valid": "*i64"}
            | integers("rows", "rows_per_slot", "classes", "groups"),
            {"ROWS": 4, "CLASSES": 1024},
        )
        step = {"x": "*fp32", "origin": "*fp32", "gradient": f"*{kind}", "values": "i32"}
        yield "ascend", "_sums_kernel", {**step, "sums": "*fp32"}, {"BLOCK": 2048}
        step |= {"previous": "*fp32", "step": "*fp32", "eps": "*fp32", "out": "*fp32"}
        step |= {"momentum": "fp32", "rest": "fp32"}
        yield "ascend", "_linf_kernel", step, {"MOMENTUM": True, "BLOCK": 1024}
        for store in (False, True):
            constants = {"MOMENTUM": True, "STORE": store, "PARTS": 128, "BLOCK": 2048}
            yield "ascend", "_l2_kernel", step | {"sums": "*fp32", "squares": "*fp32"}, constants
        for loss in range(3):
            types = {"logits": f"*{kind}", "labels": "*i64", "targets": "*i64", "loss": "*fp32"}
            types |= {"missed": "*i64", "gradient": "*fp32", "share": "fp32"}
            yield (
                "vote_loss",
                "_kernel",
                types | integers("rows", "samples", "classes"),
                {"LOSS": loss, "GRADIENT": True, "ROWS": 2, "CLASSES": 1024},
            )
            yield (
                "vote_loss",
                "_wide_kernel",
                types | integers("rows", "samples", "classes"),
                {"LOSS": loss, "GRADIENT": True, "PART": 4096},
            )
    for width in (256, 1024):
        yield (
            "random_masks",
            "_kernel",
            {"keys": "*i64", "first": "*i64", "kept": "*i64", "restore": "*i64", "mask": "*u8"}
            | integers("samples", "patches", "kept_count"),
            {"PATCHES": width},
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
