# SPDX-License-Identifier: Apache-2.0
"""Saved states of a run: written whole or not at all, found again, and compared with the command.

Until it ends in ``NAME.safetensors`` and ``NAME.state``, a run keeps pairs
``NAME-stepS.safetensors`` (weights, a checkpoint as any other) and ``NAME-stepS.state`` (optimiser,
position and what else is needed to go on bit for bit). Weights are written last: where they stand
the pair is whole. A run that chooses among its epochs keeps the best so far in
``NAME-best.safetensors``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.models.checkpoint import (
    Header,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from nimfast.models.patches import PatchModel
from train.settings import Settings, option

# What may change between a run and its continuation: where and how, not what is computed.
# `data` may move: the identity of its content is compared instead.
_FREE = {
    "data", "out", "micro_batch", "compile", "shard", "deterministic", "workers", "threads",
    "device", "save_every", "keep", "resume", "tensorboard",
}  # fmt: skip


@dataclass(frozen=True)
class States:
    """The saved states of the run that ends in the checkpoint `out`; `keep` of them are kept."""

    out: Path
    keep: int

    def found(self) -> list[Path]:
        """The states with their weights, newest first; that of the finished run before all."""
        pattern = re.compile(re.escape(self.out.stem) + r"-step(\d+)\.state")
        places = self.out.parent.iterdir() if self.out.parent.is_dir() else ()
        steps = [(int(m[1]), path) for path in places if (m := pattern.fullmatch(path.name))]
        paths = [self.out.with_suffix(".state"), *(path for _, path in sorted(steps, reverse=True))]
        return [p for p in paths if p.is_file() and p.with_suffix(".safetensors").is_file()]

    def check(self, resume: bool) -> None:
        """Raise `UserError` if an earlier run's files stand where this one's would."""
        found = self.found()
        if resume and (found or not self.out.exists()):
            return
        if self.out.exists():
            raise UserError(f"{self.out} exists; remove it or choose another --out")
        if found:
            raise UserError(f"{found[0]} exists; go on from it with --resume, or remove it")

    def save(
        self,
        model: PatchModel,
        average: nn.Module | None,
        header: Header,
        state: dict[str, Any],
        final: bool = False,
    ) -> None:
        """Write one state and remove the oldest.

        Raises:
            UserError: it could not be written; the states before it are untouched.
        """
        step = state["steps"]
        path = self.out if final else self.out.with_name(f"{self.out.stem}-step{step}.safetensors")
        beside = path.with_suffix(".state"), _averaged(path)
        content = io.BytesIO()  # torch.save into a file would hide the system's own words
        torch.save(state, content)
        try:
            with replacing(beside[0]) as file:
                file.write(content.getbuffer())
            if average is not None:
                save_checkpoint(beside[1], average, header)  # type: ignore[arg-type]
            save_checkpoint(path, model, header)
        except OSError as error:
            for place in beside:
                place.unlink(missing_ok=True)
            raise UserError(f"cannot save {path} ({error.strerror}); {self._way_on()}") from None
        for old in self.found()[self.keep :]:
            _remove(old)

    @property
    def _best(self) -> Path:
        return self.out.with_name(f"{self.out.stem}-best.safetensors")

    def save_best(self, model: PatchModel, average: nn.Module | None, header: Header) -> None:
        """Write the weights that are the best so far in place of those that were.

        Raises:
            UserError: they could not be written.
        """
        try:
            if average is not None:
                save_checkpoint(_averaged(self._best), average, header)  # type: ignore[arg-type]
            save_checkpoint(self._best, model, header)
        except OSError as error:
            raise UserError(
                f"cannot save {self._best} ({error.strerror}); {self._way_on()}"
            ) from None

    def load_best(self, model: nn.Module, average: nn.Module | None) -> None:
        """Put the weights of `save_best` into `model` and `average`."""
        for network, place in ((model, self._best), (average, _averaged(self._best))):
            if network is not None:
                load_weights(network, read_checkpoint(place)[0], place)

    def drop_best(self) -> None:
        """Remove what `save_best` wrote: the checkpoint of the run has it now."""
        for path in (self._best, _averaged(self._best)):
            path.unlink(missing_ok=True)

    def _way_on(self) -> str:
        found = self.found()
        if not found:
            return "nothing was saved before; make room and start again"
        return f"{found[0]} is whole: make room and run the same command with --resume"

    def load(self, model: nn.Module, average: nn.Module | None, expected: dict[str, Any]) -> Any:
        """The newest state, its weights put into `model` and `average`; None where there is none.

        Raises:
            UserError: it is another run's (see `_compare`), or damaged.
        """
        found = self.found()
        if not found:
            return None
        path = found[0]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{path} cannot be read ({reason}); remove it to go on from an earlier one"
            ) from None
        _compare(path, state["run"], expected)
        weights = path.with_suffix(".safetensors")
        for network, place in ((model, weights), (average, _averaged(weights))):
            if network is not None:
                load_weights(network, read_checkpoint(place)[0], place)
        return state

    def sweep(self) -> None:
        """Remove what a killed run left behind: half-written files, states without weights."""
        name = re.escape(self.out.stem)
        half = re.compile(rf"\.{name}(-step\d+|-best)?(\.ema)?\.(safetensors|state|jsonl)\.\d+")
        alone = re.compile(rf"{name}-step\d+\.state")
        whole = self.found()
        for path in self.out.parent.iterdir():
            if half.fullmatch(path.name) or (alone.fullmatch(path.name) and path not in whole):
                path.unlink(missing_ok=True)


def describe_run(script: str, settings: Settings, identity: str) -> dict[str, Any]:
    """What a run and its continuation must agree in."""
    fixed = {name: value for name, value in settings.entries().items() if name not in _FREE}
    return {"script": script, "identity": identity, **fixed}


def _compare(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise `UserError` naming the first entry in which two runs differ."""
    if saved["script"] != expected["script"]:
        raise UserError(f"{path} was made by {saved['script']}; choose another --out")
    for name in (*expected, *saved):
        old, new = saved.get(name), expected.get(name)
        if old == new:
            continue
        if name == "identity":
            raise UserError(f"{path} was made with other --data; give that, or another --out")
        raise UserError(
            f"{path} was made with {option(name)} {_typed(old)}, this command says {_typed(new)}; "
            "give the same, or another --out"
        )


def _typed(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)


def _averaged(path: Path) -> Path:
    return path.with_suffix(".ema.safetensors")


def _remove(state: Path) -> None:
    # The state last: alone it is known for a rest, and swept away.
    weights = state.with_suffix(".safetensors")
    for path in (_averaged(weights), weights, state):
        path.unlink(missing_ok=True)
