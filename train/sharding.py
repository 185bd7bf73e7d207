# SPDX-License-Identifier: Apache-2.0
"""Weights that the processes of a run share (FSDP2), so that a large network fits small devices.

Zhao et al., 2023: each process holds a part of every weight, of its gradient and of its moments; a
block's weights are gathered when the block is computed, and its gradients go back in parts. Files
hold whole tensors, so a run may go on with or without sharding, in any number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nimfast.models.checkpoint import build, describe
from nimfast.models.patches import PatchModel

T = TypeVar("T")


class Shards:
    """Shares the weights of `model`, which every process holds whole and alike, among all of them.

    Gathered at once are the weights of one block and, from the forward on, those outside of blocks.
    Autocast decides the precision of products, as without sharding; weights travel in fp32.

    Args:
        model: on this process's device; changed in place.
        compiled: translate each block by torch.compile; what gathers its weights stays outside.
    """

    def __init__(self, model: PatchModel, compiled: bool = False) -> None:
        with torch.device("meta"):  # no memory
            self.empty = build(describe(model))
        self.model = model
        # Nothing here writes into what a network returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for name, part in model.named_modules():
            if name.endswith("blocks"):
                for block in part.children():
                    if compiled:
                        block.compile()
                    fully_shard(block)
        fully_shard(model)

    def whole(self, keep: bool) -> PatchModel:
        """A copy on the CPU with whole weights; all processes call it together.

        Only where `keep` is said does it hold any. One weight at a time is whole on the device.
        """
        for name, value in self.model.state_dict().items():
            gathered = whole(value)
            if keep:
                self.empty.load_state_dict({name: gathered.cpu()}, strict=False, assign=True)
        return self.empty

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every process holds the weights whole and calls the model without the others.

        Gradients may be taken too, by the input alone. Statistics of a batch norm are process 0's.
        """
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                for statistic in layer.buffers():
                    dist.broadcast(statistic, 0)
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(id(part) != id(self.model), recurse=False)
                part.set_reshard_after_backward(True, recurse=False)


def is_shared(value: Tensor) -> bool:
    """Whether each process holds a part of `value` alone."""
    return isinstance(value, DTensor)


def whole(value: T) -> T | Tensor:
    """`value`, gathered if processes share it; then all of them have to ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's part of `value`: a view of it, or `value` itself if nothing is shared."""
    return value.to_local() if isinstance(value, DTensor) else value


def shared_like(value: Tensor | None, weight: Tensor) -> Tensor | None:
    """This process's part of `value`, which every process holds whole, shared as `weight` is.

    A `value` of another shape (a count of steps) stays as it is.
    """
    if value is None or not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    # No source: each process cuts its part out of what it has.
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
