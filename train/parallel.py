# SPDX-License-Identifier: Apache-2.0
"""One process or many (torchrun): who am I, which device is mine, what do we share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nimfast.processes import place

_known = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _known else "broadcast_buffers"


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        device: this process's.
        rank: its number; process 0 alone writes.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, with gradients averaged over the processes.

        Each process holds weights and optimiser whole: 10 GiB for ViT-H; see `train.sharding`.
        """
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Of all our buffers only the statistics of a batch norm ever change: process 0's count.
        changing = any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules())
        sync: dict[str, Any] = {_SYNC: changing}
        return DistributedDataParallel(model, device_ids=devices, **sync)

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` over the processes, on this process's device."""
        values = values.to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, number: int) -> bool:
        """Whether `number` is the same in every process."""
        spread = torch.tensor([number, -number], device=self.device)
        if self.size > 1:
            dist.all_reduce(spread, dist.ReduceOp.MAX)
        return bool(spread.sum() == 0)

    def leave(self) -> None:
        """Part from the others; nothing can be shared afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(device: str) -> World:
    """Meet the processes that torchrun started with this one; alone without torchrun.

    Args:
        device: the option ``--device``.

    Raises:
        UserError: no such device, or fewer devices than processes.
    """
    here = place(device)
    if here.store is not None and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if here.device.type == "cuda" else "gloo",
            store=here.store,
            rank=here.rank,
            world_size=here.size,
        )
    return World(here.device, here.rank, here.size)
