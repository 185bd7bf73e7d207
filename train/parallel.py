# SPDX-License-Identifier: Apache-2.0
"""One process or many (torchrun): who am I, which device is mine, what do we share."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nimfast import runtime
from nimfast.errors import UserError

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

        Each process holds weights and optimiser whole: 10 GiB for ViT-H, so nothing is sharded.
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
    picked = runtime.pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(picked)
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but RANK or LOCAL_RANK is not; start with torchrun")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if picked.type == "cuda":
        if ":" in device:
            raise UserError(f"--device {device} is one for {size} processes; give --device cuda")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes here than the {torch.cuda.device_count()} "
                "devices; lower --nproc-per-node"
            )
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun may keep its store when it starts workers again. Under the old names they would
        # find the addresses of the dead.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if picked.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"life {life}", store),
            rank=rank,
            world_size=size,
        )
    return World(picked, rank, size)
