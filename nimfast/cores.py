# SPDX-License-Identifier: Apache-2.0
"""Several parts of a batch at once on a CPU, each by one thread from beginning to end.

torch splits every single operation among its threads and waits for all of them each time, which a
small network does some ten thousand times a second. A thread that takes a part of the batch
through all layers waits once, and its activations stay in its own cache.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")

# Whose modules are known to compute in `forward` without touching anything that threads share.
_KNOWN = ("torch.nn.", "timm.", "nimfast.models.", "nimfast.runtime", "nimfast.data.")


def can_share(module: nn.Module) -> bool:
    """Whether several threads may call `module` at once: it is of known parts, without hooks."""
    return all(
        type(layer).__module__.startswith(_KNOWN)
        and not (layer.training or layer._forward_hooks or layer._forward_pre_hooks)
        for layer in module.modules()
    )


def each(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `function` with every item, as many at once as torch has threads.

    The result of an item must not depend on the others. The caller's inference mode holds inside.

    Raises:
        What `function` raises, of the first item for which it does.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        for item in items:
            function(item)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> None:
        with torch.inference_mode(inference):
            function(item)

    for _ in _team(torch.get_num_threads()).map(alone, items):
        pass


@functools.lru_cache(maxsize=4)
def _team(threads: int) -> ThreadPoolExecutor:
    """That many threads, in each of which torch has one to itself."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    team = ThreadPoolExecutor(threads, "nimfast", initializer=start)
    for _ in range(threads):
        team.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # torch also keeps the last number set for threads yet to come
    return team


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_team.cache_clear)
