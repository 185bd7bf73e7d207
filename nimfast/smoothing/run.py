# SPDX-License-Identifier: Apache-2.0
"""A certification run: the images of a data set, its settings, one process or many.

A header (see `nimfast.smoothing.result_file`) holds all settings of a run. With it, every process
makes the same decisions about the same images, so who certifies which does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nimfast.data import ImageDataset
from nimfast.errors import UserError
from nimfast.ops import Stream
from nimfast.processes import Place
from nimfast.smoothing.engine import Sampler, Work
from nimfast.smoothing.protocols import Judge, Request, judge
from nimfast.smoothing.records import Row
from nimfast.smoothing.result_file import Part

Ask = Callable[[int, int], tuple[Judge, Sequence[Request]]]
"""From index and label of an image to its judge, and all that this may ask for, in that order."""

_SAME_IN_ALL_ROWS = ("sigma", "n", "alpha", "noise", "precision", "seed", "n0")


def most_requests(header: Mapping[str, Any]) -> list[Request]:
    """All that a judge of this run may ask for, in that order."""
    selection = [Request(Stream.SELECTION, header["n0"])] if header["n0"] else []
    return [*selection, Request(Stream.ESTIMATION, header["n"])]


def protocol_name(header: Mapping[str, Any]) -> str:
    """What rows say about how they were decided: the protocol and what changes its promise."""
    options = [name.replace("_", "-") for name in ("top2", "label_free") if header[name]]
    return "-".join([header["protocol"], *options])


def noise_name(header: Mapping[str, Any]) -> str:
    """The noise, and what its distance from the noise law takes off every bound."""
    slack = header.get("slack")
    return f"{header['noise']} noise" + (f" (slack {slack:.2g})" if slack else "")


def same_in_all_rows(header: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `Row` that a run has once."""
    same = {name: header[name] for name in _SAME_IN_ALL_ROWS}
    return {**same, "protocol": protocol_name(header)}


def make_judge(header: Mapping[str, Any], label: int, num_classes: int) -> Judge:
    """The judge of one image.

    Raises:
        ValueError: settings that the protocol does not have, see `protocols.judge`.
    """
    return judge(
        header["protocol"],
        sigma=header["sigma"],
        label=None if header["label_free"] else label,
        num_classes=num_classes,
        n0=header["n0"],
        n=header["n"],
        alpha=header["alpha"],
        radii=header["radii"] or (),
        slack=header["slack"] or 0.0,
        top2=header["top2"],
    )


def certify_images(
    part: Part,
    header: Mapping[str, Any],
    left: Sequence[int],
    data: ImageDataset,
    sampler: Sampler,
    here: Place,
    ask: Ask,
    watch: Callable[[int, int], None],
) -> None:
    """Certify this process's share of the images `left`, one row each in `part`.

    Args:
        part: this process's rows.
        header: of the run.
        left: images that no row exists for; the processes of the run take them one by one.
        data: they are of.
        sampler: classifier and noise, as the header says.
        here: this process.
        ask: a judge for each image.
        watch: called with the images decided and the samples drawn by all processes since the
            start, at most a few times a second.

    Raises:
        UserError: a label outside the classes, or an image that the noise does not take.
    """
    classes = len(data.classes)
    same = same_in_all_rows(header)
    labels: dict[int, int] = {}

    def works() -> Iterator[Work[Judge]]:
        for number in here.hand_out("image", len(left)):
            index = left[number]
            image, label = data[index]
            if not 0 <= label < classes:
                raise UserError(
                    f"image {index} of {data.name} has label {label}, but there are {classes} "
                    f"classes, 0 to {classes - 1}; mend the labels or leave the image out"
                )
            labels[index] = label
            yield Work(index, image, *ask(index, label))

    count = _Counter(here, watch)
    for found in sampler.run(works(), header["batch_size"], count.samples):
        decision, label = found.judge.decision(), labels.pop(found.index)
        row = Row(
            idx=found.index,
            label=label,
            correct=decision.predict == label,
            time=found.seconds,
            invalid=found.invalid,
            **vars(decision),
            **same,
        )
        part.append(row)
        count.image()
    count.flush()


class _Counter:
    """Counts over all processes, exchanged now and then: asking the store takes 0.1 ms."""

    _SECONDS = 0.3

    def __init__(self, here: Place, watch: Callable[[int, int], None]) -> None:
        self._here, self._watch = here, watch
        self._images = self._samples = 0
        self._all = [0, 0]
        self._next = time.monotonic()

    def samples(self, number: int) -> None:
        self._samples += number
        if time.monotonic() > self._next:
            self.flush()

    def image(self) -> None:
        self._images += 1

    def flush(self) -> None:
        if self._here.store is None:
            self._all = [self._all[0] + self._images, self._all[1] + self._samples]
        else:
            self._all = [
                self._here.total("images", self._images),
                self._here.total("samples", self._samples),
            ]
        self._images = self._samples = 0
        self._next = time.monotonic() + self._SECONDS
        self._watch(*self._all)
