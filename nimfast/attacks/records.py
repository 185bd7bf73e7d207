# SPDX-License-Identifier: Apache-2.0
"""The folder of an attack run: settings, one file for each finished piece of work, states.

    run.json               all settings, and the machines that took part
    units/NAME.json        results of one attack on one batch of images, one row for each image
    units/NAME.safetensors final points of images that are kept
    units/NAME.state       an attack in the middle, to be continued

Every file is written under another name, brought to the disk and renamed, so a process may be
killed at any moment. No two processes write the same unit, so several need no lock among them; one
lock keeps a second run out.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.naming import difference

FORMAT = "nimfast attack 1"
_PER_SESSION = ("environments",)


@dataclass(frozen=True)
class Row:
    """One image under one attack at one strength of the defence.

    Attributes:
        sigma: strength of the defence, units of 1/255; 0: none.
        attack: its name; ``none`` for the clean image.
        idx, label: the image's place in the data and its class.
        draws: fresh draws of the classifier at the final point; 1 where it is not random.
        hits: how many of them are right.
        loss: mean cross-entropy over other draws, by which the strongest attack is chosen.
        margin: label's logit minus the largest other, mean over the draws.
        majority: whether the label is the most likely class: ``right``, ``wrong``, ``undecided``.
        votes: draws that decided that.
        hits_8bit: as hits, of the point rounded to an 8-bit image.
        hits_low: as hits, at the precision of the attack, where that is not fp32.
        linf, l2: distance from the clean image.
        broken_by: the attack of several that found this point; empty where it is not broken.
        gradients: forward and backward passes per image.
        seconds: per image.
    """

    sigma: float
    attack: str
    idx: int
    label: int
    draws: int
    hits: int
    loss: float
    margin: float
    majority: str
    votes: int
    hits_8bit: int
    hits_low: int | None
    linf: float
    l2: float
    broken_by: str
    gradients: float
    seconds: float


COLUMNS = tuple(field.name for field in fields(Row))


class Folder:
    """A run's folder, opened for writing; a context manager, which holds the lock.

    Args:
        path: of the folder; made where it is missing.
        option: by which the user chose it.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, option: str = "--out") -> None:
        self.path, self.option = path, option
        self._lock: IO[bytes] | None = None
        try:
            (path / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another {option}"
            ) from None

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the run that `settings` describe, or continue it; one process of a run does this.

        Args:
            settings: everything the results depend on, and this session's machine and versions as
                the only entry of ``environments``.

        Raises:
            UserError: another process is at work here, or the folder holds another run; names the
                first setting that differs.
        """
        self._lock = (self.path / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {self.path}; wait for it or choose another "
                f"{self.option}"
            ) from None
        new = json.loads(json.dumps({"format": FORMAT, **settings}))
        old = read_settings(self.path)
        if old is not None and any(
            path.suffix in (".json", ".state") for path in (self.path / "units").iterdir()
        ):
            if differs := difference(old, new, _PER_SESSION):
                raise UserError(
                    f"{self.path} holds another run: {differs}; repeat the old settings to "
                    f"continue it, or choose another {self.option}"
                )
            earlier = old["environments"]
            new["environments"] = [*earlier, *(e for e in new["environments"] if e not in earlier)]
        self.write("run.json", to_json(new))

    def results(self, unit: str) -> dict[str, Any] | None:
        """Results of a finished unit, as they were given to `finish`; None: not finished."""
        try:
            found: dict[str, Any] = json.loads((self.path / "units" / f"{unit}.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self.path}/units/{unit}.json is damaged; delete it") from None
        return found

    def finish(self, unit: str, results: Mapping[str, Any], points: Mapping[str, Tensor]) -> None:
        """Write a unit's results; it is done, and its state is gone."""
        if points:
            self._write_tensors(f"units/{unit}.safetensors", points)
        self.write(f"units/{unit}.json", to_json(results))
        (self.path / "units" / f"{unit}.state").unlink(missing_ok=True)

    def points(self, unit: str) -> dict[str, Tensor]:
        """The tensors given to `finish`; none where there were none."""
        path = self.path / "units" / f"{unit}.safetensors"
        return load_tensors(path.read_bytes()) if path.exists() else {}

    def save(self, unit: str, state: Mapping[str, Tensor]) -> None:
        """Keep a state that the unit can be continued from."""
        self._write_tensors(f"units/{unit}.state", state)

    def saved(self, unit: str) -> dict[str, Tensor] | None:
        """What `save` kept; None where there is nothing."""
        path = self.path / "units" / f"{unit}.state"
        return load_tensors(path.read_bytes()) if path.exists() else None

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a whole file.

        Raises:
            UserError: the disk is full or failed.
        """
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(content)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; the same command continues"
            ) from None

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.write(name, save_tensors(_unshared(plain)))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the run that `folder` holds; None where it holds none.

    Raises:
        UserError: the file is none of ours.
    """
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); move it away") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is not of this version's attack runs; choose another --out")
    return found


def ball(norm: str, eps: float) -> str:
    """Norm and radius as titles have them: ``linf 4/255``, ``l2 0.5``."""
    return f"linf {255 * eps:.4g}/255" if norm == "linf" else f"{norm} {eps:g}"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where two names share memory, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def to_json(content: Mapping[str, Any]) -> bytes:
    """One entry per line: easy to read, and a list of thousands of images stays one line."""
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in content.items())
    return ("{\n" + lines + "\n}\n").encode()


def to_tsv(rows: Sequence[Row]) -> bytes:
    """All rows as a table with a line of column names."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = asdict(row).values()
        writer.writerow("" if v is None else v for v in values)
    return text.getvalue().encode()


def read_tsv(path: Path) -> list[Row]:
    """The rows of a file that `to_tsv` made.

    Raises:
        UserError: no such file, or none of ours.
    """
    kinds = {field.name: str(field.type) for field in fields(Row)}
    try:
        with path.open(newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        return [Row(**{n: _parse(kinds[n], row[n]) for n in COLUMNS}) for row in table]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of attack results ({error})") from None


def _parse(kind: str, text: str) -> Any:
    if kind.endswith("| None") and not text:
        return None
    kind = kind.removesuffix(" | None")
    return {"int": int, "float": float, "str": str}[kind](text)


def random_states() -> dict[str, Tensor]:
    """torch's generators, for models whose randomness has no key."""
    states = {"rng cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(state: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave, and take it out of `state`."""
    if (cpu := state.pop("rng cpu", None)) is not None:
        torch.set_rng_state(cpu)
    if (cuda := state.pop("rng cuda", None)) is not None:
        torch.cuda.set_rng_state(cuda)
