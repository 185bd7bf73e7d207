# SPDX-License-Identifier: Apache-2.0
"""Which samples go into which slot of a batch: images in flight, and what is known of each.

A slot is up to 32 consecutive samples of one stream of one image; a piece is slots in a row. Every
image in flight gets slots for the samples its judge wants, the oldest image first; then new images
are let in; where there are none left, images run ahead of their judge, in the hope that it goes on.
A judge is told prefixes only, in the order of samples, so its decision does not depend on what
shared a batch with what.

Host side only: no device, no noise, no network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from nimfast.ops import Stream
from nimfast.smoothing.protocols import Request

SLOT = 32


def slot_samples(batch_size: int) -> int:
    """Samples per slot: 32, or the largest power of two that a smaller batch holds.

    Powers of two, so that no slot lies across a multiple of 32, where judges like to look.
    """
    return min(SLOT, 1 << (batch_size.bit_length() - 1))


def batch_rows(batch_size: int, requests: Sequence[Request]) -> int:
    """Rows of the fixed compute shape: at most `batch_size`, split evenly over the batches.

    Args:
        batch_size: most rows.
        requests: all that one image may ask for.
    """
    slot = slot_samples(batch_size)
    slots = sum(-(-request.n // slot) for request in requests)
    batches = -(-slots // (batch_size // slot))
    return -(-slots // batches) * slot


class Asking(Protocol):
    """What drives the sampling of one image: a `Judge`, or anything that asks as one does."""

    def wants(self) -> Request | None:
        """The samples to count next, a longer prefix of a stream; None at the end."""

    def tell(self, counts: list[int]) -> Any:
        """Take their votes, K + 1 counts."""


Asks = TypeVar("Asks", bound=Asking)


class Piece(NamedTuple):
    """Samples `first` to `end` - 1 of a stream: what slots in a row work on, the last in part."""

    stream: Stream
    first: int
    end: int

    def slots(self, slot: int) -> int:
        """How many slots of that size."""
        return -(-(self.end - self.first) // slot)


@dataclass
class _Tally:
    """One stream of one image. Pieces are known by their first sample."""

    told: np.ndarray  # [K + 1], over the first `samples` samples
    slot: int  # samples per slot
    samples: int = 0
    given: int = 0  # samples for which slots were given
    waiting: dict[int, int] = field(default_factory=dict)  # -> end
    arrived: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)  # -> end, counts

    def give(self, stream: Stream, upto: int, room: int) -> Piece | None:
        """A piece of at most `room` slots for samples before `upto` that have none yet."""
        first = self.given
        if first >= upto or room < 1:
            return None
        if first % self.slot:  # a look lay inside a slot: to the next place where slots begin
            end = min(upto, first + self.slot, (first // SLOT + 1) * SLOT)
        else:
            end = min(upto, first + room * self.slot)
        self.given = self.waiting[first] = end
        return Piece(stream, first, end)

    def prefix(self, n: int) -> np.ndarray | None:
        """Counts of the first `n` samples, once all of them have arrived."""
        while self.samples < n and self.samples in self.arrived:
            end, counts = self.arrived.pop(self.samples)  # counts are [slots, K + 1]
            slots = len(counts) if end <= n else (n - self.samples) // self.slot
            self.told = self.told + counts[:slots].sum(0)
            self.samples = end if end <= n else self.samples + slots * self.slot
            if self.samples < min(n, end):  # ran ahead across a look: drawn again, up to the look
                self.arrived.clear()
                self.waiting.clear()
                self.given = self.samples
                return None
            if self.samples < end:
                self.arrived[self.samples] = end, counts[slots:]
        return self.told if self.samples == n else None


class InFlight(Generic[Asks]):
    """An image whose judge has not decided.

    Args:
        index: which image.
        place: its row in the device's pool of images.
        judge: see `nimfast.smoothing.protocols`.
        most: all that the judge might ask for, in that order; how far to run ahead.
        num_classes: K.
        slot: samples per slot.
    """

    def __init__(
        self,
        index: int,
        place: int,
        judge: Asks,
        most: Sequence[Request],
        num_classes: int,
        slot: int,
    ) -> None:
        self.index = index
        self.place = place
        self.judge = judge
        self.seconds = 0.0
        self._most = most
        self._slot = slot
        self._tallies: dict[Stream, _Tally] = {}
        self._empty = np.zeros(num_classes + 1, dtype=np.int64)

    @property
    def invalid(self) -> int:
        """Samples that were votes for no class, of those the judge was told."""
        return sum(int(tally.told[-1]) for tally in self._tallies.values())

    def wanted(self, room: int) -> Piece | None:
        """At most `room` slots of what the judge wants and has no slot yet."""
        request = self.judge.wants()
        if request is None:
            return None
        return self._tally(request.stream).give(request.stream, request.n, room)

    def ahead(self) -> Piece | None:
        """One slot of what it might want later, most likely first."""
        for stream, n in self._most:
            if piece := self._tally(stream).give(stream, n, 1):
                return piece
        return None

    def arrive(self, piece: Piece, counts: np.ndarray) -> None:
        """Take the votes [slots, K + 1] of `piece`, and tell the judge all it can be told."""
        tally = self._tally(piece.stream)
        if tally.waiting.get(piece.first) != piece.end:  # given up since
            return
        del tally.waiting[piece.first]
        tally.arrived[piece.first] = piece.end, counts
        while (request := self.judge.wants()) is not None:
            known = self._tally(request.stream).prefix(request.n)
            if known is None:
                return
            self.judge.tell(known.tolist())

    def _tally(self, stream: Stream) -> _Tally:
        if stream not in self._tallies:
            self._tallies[stream] = _Tally(self._empty, self._slot)
        return self._tallies[stream]


Assignment = list[tuple[InFlight[Any], Piece]]
"""Who works in the slots, piece by piece; slots beyond its end are padding."""


class Schedule(Generic[Asks]):
    """Fills batches of `slots` slots from the images that `admit` lets in, and takes the votes.

    Args:
        admit: called with a free place, the next image there, or None when there are no more.
        slots: slots per batch.
        slot: samples per slot.
        places: most images in flight.
    """

    def __init__(
        self, admit: Callable[[int], InFlight[Asks] | None], slots: int, slot: int, places: int
    ) -> None:
        self._admit = admit
        self._slots = slots
        self._slot = slot
        self._free = list(range(places))[::-1]
        self._images: list[InFlight[Asks]] = []

    def fill(self) -> Assignment:
        """Work for the next batch; empty where nothing is left to give out."""
        work: Assignment = []
        room = self._slots
        for image in self._images:
            room = self._give(work, image, room)
        while self._free and room:
            new = self._admit(self._free[-1])
            if new is None:
                break
            self._free.pop()
            self._images.append(new)
            room = self._give(work, new, room)
        # Ahead of the judges, one slot each in turn: nobody knows who will need it.
        ahead = deque(self._images)
        while ahead and room:
            image = ahead.popleft()
            if piece := image.ahead():
                work.append((image, piece))
                room -= 1
                ahead.append(image)
        return work

    def _give(self, work: Assignment, image: InFlight[Asks], room: int) -> int:
        """Slots for what `image` wants, as far as there is `room`; what room is left then."""
        while room and (piece := image.wanted(room)):
            work.append((image, piece))
            room -= piece.slots(self._slot)
        return room

    def arrive(self, work: Assignment, counts: np.ndarray, seconds: float) -> list[InFlight[Asks]]:
        """Take the votes int64 [slots, K + 1] of a batch; the images decided by it, oldest first.

        `seconds`, the time of the batch, is shared among its slots.
        """
        slots = [piece.slots(self._slot) for _, piece in work]
        share, first = seconds / max(1, sum(slots)), 0
        for (image, piece), number in zip(work, slots, strict=True):
            image.seconds += share * number
            image.arrive(piece, counts[first : first + number])
            first += number
        done = [image for image in self._images if image.judge.wants() is None]
        if done:
            self._images = [image for image in self._images if image.judge.wants() is not None]
            self._free += [image.place for image in done]
        return done
