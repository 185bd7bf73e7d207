# SPDX-License-Identifier: Apache-2.0
"""Reading the published implementations' inputs, weights and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nimfast.options import Hints

Tensors = dict[str, Tensor]


def read_case(folder: Path, name: str) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Tensors of a case, its published state dict, and its configuration."""
    content = load_file(folder / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in content.items() if k.startswith("state.")}
    cases = json.loads((folder / "cases.json").read_text())
    return content, state, cases[name]


def hints(case: dict[str, Any]) -> Hints:
    """Heads: the tiny widths of the cases do not give them away."""
    config = case["config"]
    return Hints(heads=config["num_heads"], decoder_heads=config.get("decoder_num_heads"))
