# SPDX-License-Identifier: Apache-2.0
"""The sampling engine: votes of a classifier over noisy copies of many images.

All samples run in batches of one fixed shape, made of slots that are refilled from the images in
flight (module `schedule`). What no image needs is padding, computed and not counted: matrix
products round differently in other shapes, and the classifier under test must be one function.
Votes are counted on the device; one small tensor comes back per batch. On CUDA the next batch is
under way before the votes of the last are read.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nimfast.ops import Stream, image_keys, votes
from nimfast.smoothing.checks import check_modules
from nimfast.smoothing.protocols import Request
from nimfast.smoothing.schedule import (
    Asks,
    Assignment,
    InFlight,
    Schedule,
    batch_rows,
    slot_samples,
)

_KEY_BLOCK = 1024  # a key by itself costs as much as a thousand together


@dataclass(frozen=True)
class Work(Generic[Asks]):
    """An image to decide about.

    Attributes:
        index: names its noise; another index, other noise.
        image: ``[C, H, W]``, pixels in [0, 1], on any device; all images of a run in one shape.
        judge: says what to sample; see `nimfast.smoothing.protocols`.
        most: all that the judge might ask for, in that order.
    """

    index: int
    image: Tensor
    judge: Asks
    most: Sequence[Request]


@dataclass(frozen=True)
class Finished(Generic[Asks]):
    """What was decided about an image.

    Attributes:
        index: as in `Work`.
        judge: as in `Work`; it wants nothing more.
        seconds: its share in the time of the batches it took part in.
        invalid: samples whose logits held NaN or infinity, of those the judge was told.
    """

    index: int
    judge: Asks
    seconds: float
    invalid: int


class Votes(Protocol):
    """What is sampled: a `Network`, or what can be asked as one."""

    module: nn.Module
    num_classes: int

    @property
    def device(self) -> torch.device | None:
        """Where the weights lie; None for one without weights."""

    def accept(self, image: Tensor) -> Tensor:
        """An image ``[C, H, W]`` as it is sampled."""

    def __call__(self, images: Tensor, keys: Tensor, first: Tensor, samples: int) -> Tensor:
        """Logits ``[B * samples, num_classes]`` of noisy copies."""


class Sampler:
    """Counts the votes of one classifier under noise of one sigma.

    Args:
        network: classifier and noise.
        seed: of all noise; with it, every count is a function of the image and its index.
        graphs: on CUDA, record a batch once as a CUDA graph and replay it.
    """

    def __init__(self, network: Votes, *, seed: int, graphs: bool = False) -> None:
        self.network = network
        self.seed = seed
        self.graphs = graphs
        self._keys = functools.lru_cache(maxsize=16)(self._key_block)

    def counts(
        self,
        image: Tensor,
        index: int,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda samples: None,
    ) -> list[list[int]]:
        """Votes of the noisy copies of one image.

        Args:
            image: ``[C, H, W]``, pixels in [0, 1], on any device.
            index: which image this is; another index, other noise.
            requests: what to draw, each of another stream; each is counted on its own.
            batch_size: most rows per forward pass; the result does not depend on it, but for
                samples whose two largest logits lie within rounding of each other.
            progress: called after every batch with the number of samples it counted.

        Returns:
            For each request K + 1 counts: votes for each class, then the samples whose logits held
            NaN or infinity, which are votes for no class.

        Raises:
            ValueError: an argument out of range, or logits that are not ``[N, K]``.
        """
        judge = _Tell(requests)
        self.decide(Work(index, image, judge, requests), batch_size, progress)
        return judge.told

    def decide(
        self,
        work: Work[Asks],
        batch_size: int,
        progress: Callable[[int], None] = lambda samples: None,
    ) -> Finished[Asks]:
        """`run` for one image, in a compute shape that fits all it might ask for."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not work.most or any(request.n < 1 for request in work.most):
            raise ValueError(f"every request must ask for at least 1 sample, not {list(work.most)}")
        (finished,) = self.run([work], batch_rows(batch_size, work.most), progress, places=1)
        return finished

    def run(
        self,
        images: Iterable[Work[Asks]],
        rows: int,
        progress: Callable[[int], None] = lambda samples: None,
        places: int | None = None,
    ) -> Iterator[Finished[Asks]]:
        """Decide about many images, several at a time; they come as they are decided.

        Args:
            images: taken one by one, each when there is room for it in a batch.
            rows: of the fixed compute shape, as `batch_rows` gives them.
            progress: called after every batch with the number of samples it counted.
            places: most images in flight; default as many as keep the device busy.

        Raises:
            ValueError: an image that the classifier does not take, logits that are not ``[N, K]``,
                or a classifier that eval mode does not reach, see `check_modules`.
        """
        source = iter(images)
        first = next(source, None)
        if first is None:
            return
        self.network.module.eval()
        check_modules(self.network.module)
        device = self.network.device or first.image.device
        slot = slot_samples(rows)
        depth = 2 if device.type == "cuda" else 1
        batch = _Batch(
            self.network,
            self.network.accept(first.image).to(device),
            slots=rows // slot,
            slot=slot,
            places=places or depth * (rows // slot),
            graph=self.graphs,
        )

        source = itertools.chain([first], source)

        def admit(place: int) -> InFlight[Asks] | None:
            work = next(source, None)
            if work is None:
                return None
            batch.put(place, self.network.accept(work.image))
            return InFlight(work.index, place, work.judge, work.most, self.network.num_classes)

        schedule = Schedule(admit, batch.slots, slot, batch.places)
        under_way: deque[tuple[Assignment, Callable[[], np.ndarray]]] = deque()
        before = time.perf_counter()
        while True:
            given = schedule.fill()
            if given:
                under_way.append((given, batch.start(self._table(given))))
            if not under_way:
                return
            if given and len(under_way) < depth:
                continue
            given, read = under_way.popleft()
            counts = read()
            now = time.perf_counter()
            done = schedule.arrive(given, counts, now - before)
            before = now
            progress(sum(piece.end - piece.first for _, piece in given))
            for image in done:
                yield Finished(image.index, image.judge, image.seconds, image.invalid)

    def _table(self, given: Assignment) -> list[tuple[int, int, int, int]]:
        """For each slot given out: place of the image, key, first sample, samples that count."""
        return [
            (
                image.place,
                self._key(piece.stream, image.index),
                piece.first,
                piece.end - piece.first,
            )
            for image, piece in given
        ]

    def _key(self, stream: Stream, index: int) -> int:
        return self._keys(stream, index // _KEY_BLOCK)[index % _KEY_BLOCK]

    def _key_block(self, stream: Stream, block: int) -> list[int]:
        indices = torch.arange(block * _KEY_BLOCK, (block + 1) * _KEY_BLOCK)
        keys: list[int] = image_keys(self.seed, stream, indices).tolist()
        return keys


class _Batch:
    """One fixed shape on the device: a pool of images, and how a batch of their samples runs."""

    def __init__(
        self, network: Votes, image: Tensor, *, slots: int, slot: int, places: int, graph: bool
    ) -> None:
        self.slots = slots
        self.places = places
        self._network = network
        self._slot = slot
        self._device = image.device
        self._pool = image.new_empty((places, *image.shape))
        self._table = torch.zeros(4, slots, dtype=torch.int64, device=image.device)
        shape = (slots, network.num_classes + 1)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=image.device)
        self._wants_graph = graph and image.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def put(self, place: int, image: Tensor) -> None:
        """Place an image in the pool."""
        if image.shape != self._pool.shape[1:]:
            raise ValueError(
                f"all images must have one shape: {tuple(self._pool.shape[1:])}, "
                f"not {tuple(image.shape)}"
            )
        self._pool[place].copy_(image)

    @torch.inference_mode()
    def start(self, rows: Sequence[tuple[int, int, int, int]]) -> Callable[[], np.ndarray]:
        """Set a batch going; the function returned waits for its counts, int64 [slots, K + 1]."""
        padding = [(0, 0, 0, 0)] * (self.slots - len(rows))
        table = torch.tensor([*rows, *padding]).T.contiguous()
        if self._device.type != "cuda":
            self._table.copy_(table)
            self._compute()
            counts = self._counts.cpu().numpy().copy()
            return lambda: counts
        self._table.copy_(table.pin_memory(), non_blocking=True)
        if self._wants_graph and self._graph is None:
            self._record()
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        found = torch.empty(self._counts.shape, dtype=torch.int64, pin_memory=True)
        found.copy_(self._counts, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()

        def read() -> np.ndarray:
            ready.synchronize()
            return found.numpy()

        return read

    def _compute(self) -> None:
        place, keys, first, valid = self._table.unbind()
        # Of a single image a view with stride 0: it is read once per slot and never copied.
        alone = self.places == 1
        images = (
            self._pool.expand(self.slots, *self._pool.shape[1:])
            if alone
            else self._pool.index_select(0, place)
        )
        logits = self._network(images, keys, first, self._slot)
        self._counts.zero_()
        votes(logits, self._counts, valid=valid)

    def _record(self) -> None:
        """Record `_compute` as a CUDA graph, after the warm-up that lazy initialisation needs."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        self._graph = graph


class _Tell:
    """Asks for every request in turn and keeps what it is told."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self.told: list[list[int]] = []

    def wants(self) -> Request | None:
        left = self._requests[len(self.told) :]
        return left[0] if left else None

    def tell(self, counts: Sequence[int]) -> None:
        self.told.append(list(counts))
