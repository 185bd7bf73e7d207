# SPDX-License-Identifier: Apache-2.0
"""One process or many (torchrun): who am I, which device is mine, and a store that all share.

Certification and attacks need no collective operation. They hand out images through the store that
torchrun keeps, so each process works at its own speed, and none waits for another but at the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nimfast import runtime
from nimfast.errors import UserError

# Others may be in the middle of hours of work. Where one dies, torchrun ends us or the connection
# breaks, so nobody waits this long in vain.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Place:
    """This process among those of a run.

    Attributes:
        device: this process's own.
        rank: its number, from 0.
        size: how many there are.
        store: what they share, empty at the start of each life; None for a process alone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def hand_out(self, name: str, count: int) -> Iterator[int]:
        """Numbers 0 to count - 1 in order; over all processes that ask, each number once."""
        if self.store is None:
            yield from range(count)
            return
        while (number := self.store.add(name, 1) - 1) < count:
            yield number

    def tell(self, name: str, text: str) -> None:
        """Let every process `hear` this."""
        if self.store is not None:
            self.store.set(name, text)

    def hear(self, name: str) -> str:
        """What a process of this run did `tell`, or will: waits for it."""
        if self.store is None:
            raise ValueError("a process alone has nobody to hear")
        self.store.wait([name], _PATIENCE)
        return self.store.get(name).decode()

    def total(self, name: str, add: int) -> int:
        """Sum of what all processes have added under `name`, this one's `add` included."""
        if self.store is None:
            raise ValueError("a process alone has nobody to count with")
        return self.store.add(name, add)

    def meet(self, name: str) -> None:
        """Wait until every process has come here; `name` says which meeting."""
        if self.store is not None:
            self.store.set(f"{name}/{self.rank}", "")
            self.store.wait([f"{name}/{rank}" for rank in range(self.size)], _PATIENCE)


def place(device: str) -> Place:
    """Meet the processes that torchrun started with this one; alone without torchrun.

    Args:
        device: the option ``--device``.

    Raises:
        UserError: no such device, or fewer devices than processes.
    """
    picked = runtime.pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Place(picked)
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
    return Place(picked, rank, size, _store())


@functools.cache
def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun may keep its store when it starts workers again. Under the old names they would find
    # what the dead have left.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"life {life}", store)
