# SPDX-License-Identifier: Apache-2.0
"""Certificates of a changed model from those of the model before: what `nimfast.recertify` does.

For a model that was quantised, pruned or fine-tuned a little: images are not certified anew, only
how often the two models differ on noisy copies is bounded, from far fewer samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nimfast import cli
from nimfast.commands.certification import base_classifier, fill, report, sample, sharing
from nimfast.data import ImageDataset
from nimfast.data import load as load_data
from nimfast.errors import UserError
from nimfast.naming import run_name
from nimfast.ops import Stream
from nimfast.processes import Place, place
from nimfast.runtime import (
    DTYPES,
    check_precision,
    environment,
    keep_freed_memory,
    prepare,
)
from nimfast.smoothing import bounds, run, settings, smooth
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.changed import Carry, Pair
from nimfast.smoothing.checks import check_function
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Judge, Request
from nimfast.smoothing.records import Row, header_path, read, read_header
from nimfast.smoothing.result_file import Part

if TYPE_CHECKING:
    from nimfast.recertify import Config

PROTOCOL = "recertify"


def recertify(config: Config) -> None:
    """Carry over what `config` names, continuing a run that was interrupted."""
    here = place(config.device)
    check_precision(config.precision, here.device)
    if here.device.type == "cpu":
        keep_freed_memory()
    old_header, rows = _finished(config.file)
    earlier_rows = {row.idx: row for row in rows}
    data = load_data(old_header["data"])
    if data.identity() != old_header["data_identity"]:
        raise UserError(
            f"data {old_header['data']} is not that of {config.file}: it has changed since, or "
            "lies elsewhere; certify the new model by nimfast.certify"
        )
    sigma = float(old_header["sigma"])
    pair, weights = _pair(config, old_header, data, here)
    out = config.out or Path("results") / f"{_file_name(config)}.tsv"
    most = [Request(Stream.EVALUATION, config.n)]

    def describe(earlier: Mapping[str, Any]) -> dict[str, Any]:
        header = _header(config, old_header, earlier, here, weights)
        image = data[header["images"][0]][0].to(here.device)
        try:
            deterministic = [
                check_function(network, image, header["batch_size"])
                for network in (pair.old, pair.new)
            ]
        except ValueError as error:
            raise UserError(f"model {config.model} on {header['data']}: {error}") from None
        return {**header, "deterministic": all(deterministic)}

    def begin(part: Part, header: dict[str, Any]) -> None:
        _announce(config, header, len(part.done), here)
        for row in rows:  # nothing to carry over
            if row.predict == ABSTAIN and row.idx not in part.done:
                part.append(_abstained(row, header))

    def work(part: Part, header: dict[str, Any], left: Sequence[int]) -> None:
        def ask(index: int, label: int) -> tuple[Judge, list[Request]]:
            judge = Carry(
                earlier_rows[index],
                len(data.classes),
                sigma=sigma,
                n=config.n,
                alpha=config.alpha,
                slack=header["slack"] or 0.0,
            )
            return judge, most

        sampler = Sampler(pair, seed=header["seed"])
        sample(part, header, left, data, sampler, here, ask)

    if done := fill(out, here, describe=describe, begin=begin, work=work):
        header, found = done
        best = max(row.p_lower or 0.0 for row in rows)
        _, largest = bounds.recertify(best, 0, config.n, config.alpha, sigma, header["slack"] or 0)
        report(out, found, header, settings.radius_grid(sigma, largest), largest)


def _finished(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a finished run.

    Raises:
        UserError: it is none.
    """
    rows = read(path)
    header = read_header(path)
    if header is None:
        raise UserError(
            f"{path} has no header {header_path(path).name} beside it, which says what was "
            "certified; certify the old model by nimfast.certify first"
        )
    if sorted(row.idx for row in rows) != sorted(header["images"]):
        raise UserError(
            f"{path} holds {len(rows)} of its {len(header['images'])} images; finish that run first"
        )
    return header, rows


def _pair(
    config: Config, old: Mapping[str, Any], data: ImageDataset, here: Place
) -> tuple[Pair, str]:
    """Both models under the same noise, and the hash of the new one's weights."""
    sigma = float(old["sigma"])
    checkpoint = None if config.before or not old["checkpoint"] else Path(old["checkpoint"])
    name = config.before or old["model"]
    before, _ = base_classifier(name, data, checkpoint=checkpoint, sigma=sigma)
    if before.weights_hash != old["weights_hash"]:
        raise UserError(
            f"the weights of {name} are not those that {config.file} certified; "
            "give the model of that run by --before"
        )
    after, _ = base_classifier(config.model, data, checkpoint=config.checkpoint, sigma=sigma)
    networks = (
        Network(
            prepare(model, here.device, precision, packed=packed),
            len(data.classes),
            sigma,
            noise=old["noise"],
            dtype=DTYPES[precision],
        )
        for model, precision, packed in (
            (before, old["precision"], not old.get("compile")),
            (after, config.precision, True),
        )
    )
    pair = Pair(*networks)
    if old.get("compile"):  # what was certified is the translated classifier
        image = data[old["images"][0]][0].to(here.device)
        if not pair.old.compile(image, old["batch_size"]):
            raise UserError(
                f"{config.file} was certified with --compile, which {name} does not take here; "
                "certify the new model by nimfast.certify"
            )
    return pair, str(after.weights_hash)


def _header(
    config: Config,
    old: Mapping[str, Any],
    earlier: Mapping[str, Any],
    here: Place,
    weights: str,
) -> dict[str, Any]:
    """All settings of the run, over those of the file; a seed not given is the earlier one's."""
    seed = config.seed if config.seed is not None else earlier.get("seed", smooth.new_seed())
    return {
        **{name: value for name, value in old.items() if name not in ("format", "compile")},
        "model": config.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint else None,
        "weights_hash": weights,
        "protocol": PROTOCOL,
        "label_free": False,
        "top2": False,
        "n0": 0,
        "n": config.n,
        "alpha": old["alpha"] + config.alpha,
        "precision": config.precision,
        "slack": old.get("slack"),
        "device": here.device.type,
        "seed": seed,
        "before": {
            "model": old["model"],
            "weights_hash": old["weights_hash"],
            "precision": old["precision"],
            "protocol": run.protocol_name(old),
            "alpha": old["alpha"],
            "file_hash": hashlib.sha256(config.file.read_bytes()).hexdigest(),
        },
        "environments": [{**environment(here.device), "processes": here.size}],
    }


def _announce(config: Config, header: Mapping[str, Any], done: int, here: Place) -> None:
    cli.console.print(
        f"{len(header['images'])} images of {header['data']} ({header['split']}), model "
        f"{header['model']} after {header['before']['model']} ({config.file}), sigma "
        f"{header['sigma']:g}, n {config.n:,}, alpha {header['alpha']:g} in all, "
        f"{run.noise_name(header)}, {header['precision']} on "
        f"{header['device']}{sharing(here)}, seed {header['seed']}"
        + (f"; {done} done before" if done else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _abstained(row: Row, header: Mapping[str, Any]) -> Row:
    return Row(
        idx=row.idx,
        label=row.label,
        predict=ABSTAIN,
        radius=0.0,
        correct=False,
        time=0.0,
        count=0,
        samples=0,
        p_lower=0.0,
        invalid=0,
        **run.same_in_all_rows(header),
    )


def _file_name(config: Config) -> str:
    parts = ["recertify", config.file.stem, config.model, f"n{config.n}"]
    return run_name(parts, config, {"file", "model", "before", "n", "device", "out"})
