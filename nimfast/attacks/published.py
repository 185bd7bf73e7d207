# SPDX-License-Identifier: Apache-2.0
"""AutoAttack as the published class is called, so that a script runs after changing its import."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nimfast.attacks.autoattack import Ensemble, Version, plan
from nimfast.attacks.engine import Attack, Norm, State, check_images
from nimfast.attacks.judge import judge
from nimfast.attacks.records import Folder, random_states, restore_random
from nimfast.attacks.target import Target
from nimfast.attacks.watch import Watch
from nimfast.models.checkpoint import state_hash
from nimfast.ops import Stream, image_keys
from nimfast.options import Protocol
from nimfast.runtime import environment


class _Forward(nn.Module):
    """A function from images to logits as a module that lies on `device`."""

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("place", torch.zeros(0, device=device))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class AutoAttack:
    """Takes the place of the published class: ``AutoAttack(model, norm="Linf", eps=8 / 255)``.

    Args:
        model: a module, or a function, from images in [0, 1] to logits; or a `Target`.
        norm: "Linf", "L2" or "L1", or as elsewhere here.
        eps: radius.
        seed: of all draws; None for one from the operating system.
        verbose: print accuracies.
        attacks_to_run: names or attacks, for version "custom".
        version: "standard", "plus", "rand" or "custom".
        device: where a function computes (default: the CPU). A module computes where it lies;
            images are brought there.
        protocol: see the module's text; default "fair" for "rand" and "official" otherwise.
        log_path: a file that gets what is printed.

    Raises:
        ValueError: see `plan`; a module that lies on another device.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor] | Target,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        seed: int | None = 0,
        verbose: bool = True,
        attacks_to_run: Sequence[str | Attack] = (),
        version: Version = "standard",
        device: str | torch.device | None = None,
        protocol: Protocol | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        self.model = _placed(model, None if device is None else torch.device(device))
        self.norm: Norm = norm.lower()  # type: ignore[assignment]
        self.eps = eps
        self.seed = secrets.randbits(48) if seed is None else seed
        self.verbose = verbose
        self.attacks_to_run = tuple(attacks_to_run)
        self.version = version
        self.protocol: Protocol = protocol or ("fair" if version == "rand" else "official")
        self.log_path = log_path
        self.ensemble(classes=10)  # bad settings are refused now, not after a first batch

    def ensemble(self, classes: int) -> Ensemble:
        """The attacks, for a model with that many classes."""
        attacks = plan(
            self.version, self.protocol, norm=self.norm, eps=self.eps, classes=classes,
            seed=self.seed, attacks=self.attacks_to_run,
        )  # fmt: skip
        return Ensemble(tuple(attacks), fair=self.protocol == "fair", seed=self.seed)

    @overload
    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: Literal[False] = False,
        state_path: str | Path | None = None,
        *,
        indices: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        *,
        return_labels: Literal[True],
        state_path: str | Path | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        *,
        indices: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Adversarial images, like `x_orig`; an image that withstood is returned as it is.

        Args:
            x_orig: fp32 ``[N, C, H, W]`` in [0, 1].
            y_orig: labels, int64 ``[N]``.
            bs: images attacked at a time; results do not depend on it, but for rounding.
            return_labels: return the classes of the adversarial images as well, int64 ``[N]``, from
                one look (of a randomised model: a fresh draw).
            state_path: a folder that keeps finished batches and, every 30 seconds, the state of the
                one under way. The same call continues from there and gives the same points.
            indices: places in the data set, int64 ``[N]``; with the seed they decide all draws.

        Raises:
            TypeError, ValueError: see `check_images`; bs less than 1.
            UserError: `state_path` holds another evaluation, or cannot be written.
        """
        ensemble, indices = self._begin(x_orig, y_orig, bs, indices)
        if state_path is None:
            x_adv, by = self._run(ensemble, x_orig, y_orig, bs, indices)
        else:
            with Folder(Path(state_path), option="state_path") as folder:
                folder.begin(self._describe(ensemble, x_orig, y_orig, bs, indices))
                x_adv, by = self._run(ensemble, x_orig, y_orig, bs, indices, folder)
        if len(x_orig) and ensemble.fair and self._randomised(x_orig):
            lines = [
                f"{name} accuracy over {ensemble.draws} fresh draws of each image: "
                f"{self._accuracy(x, y_orig, bs, indices, ensemble.draws):.2%}"
                for name, x in (("clean", x_orig), ("robust", x_adv))
            ]
        else:
            lines = [f"initial accuracy: {(by != -1).float().mean():.2%}"]
            for number, (name, _) in enumerate(ensemble.attacks):
                left = ((by == -2) | (by > number)).float().mean()
                lines.append(f"robust accuracy after {name}: {left:.2%}")
        self._report(lines if len(x_orig) else [])
        return (x_adv, self._classes(x_adv, bs, indices)) if return_labels else x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, *, indices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Every attack by itself on all images: its name -> adversarial images, like `x_orig`.

        Args, Raises: as `run_standard_evaluation`.
        """
        ensemble, indices = self._begin(x_orig, y_orig, bs, indices)
        draws = ensemble.draws if len(x_orig) and self._randomised(x_orig) else 1
        found = {}
        for name, attack in ensemble.attacks:
            alone = replace(ensemble, attacks=((name, attack),))
            found[name], _ = self._run(alone, x_orig, y_orig, bs, indices)
            if len(x_orig):
                accuracy = self._accuracy(found[name], y_orig, bs, indices, draws)
                self._report([f"robust accuracy by {name}: {accuracy:.2%}"])
        return found

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Share of the images that are right; of a randomised model, of fresh draws of them.

        Args, Raises: as `run_standard_evaluation`.
        """
        if not len(x_orig):
            raise ValueError("x_orig holds no images; there is no accuracy of none")
        ensemble, indices = self._begin(x_orig, y_orig, bs, None)
        draws = ensemble.draws if self._randomised(x_orig) else 1
        accuracy = self._accuracy(x_orig, y_orig, bs, indices, draws)
        self._report([f"clean accuracy: {accuracy:.2%}"])
        return accuracy

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As `run_standard_evaluation`."""
        return self.run_standard_evaluation(x, y)

    def _begin(
        self, x: Tensor, y: Tensor, bs: int, indices: Tensor | None
    ) -> tuple[Ensemble, Tensor]:
        """The attacks, after checking what they are to work on; the places of the images."""
        if bs < 1:
            raise ValueError(f"bs is {bs}; it must be at least 1")
        # Anew, as the model may have been trained on since: a target may hold a copy.
        model = self.model
        target = self.target = model if isinstance(model, Target) else Target(model, packed=True)
        first = x[:1]
        check_images(x, y, lambda: target.classes(first.to(target.device)))
        classes = target.classes(first.to(target.device)) if len(x) else 10
        return self.ensemble(classes), torch.arange(len(x)) if indices is None else indices

    def _run(
        self,
        ensemble: Ensemble,
        x: Tensor,
        y: Tensor,
        bs: int,
        indices: Tensor,
        folder: Folder | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final points, like `x`, and which attack found them, see `Ensemble`."""
        points, by = [x[:0]], [torch.zeros(0, dtype=torch.int64)]
        for at in range(0, len(x), bs):
            part = slice(at, at + bs)
            batch = x[part], y[part], indices[part]
            found = self._batch(ensemble, batch, folder, f"batch_{at // bs:06d}")
            points.append(found["x_adv"].to(x.device))
            by.append(found["by"].cpu())
        return torch.cat(points), torch.cat(by)

    def _batch(
        self,
        ensemble: Ensemble,
        batch: tuple[Tensor, Tensor, Tensor],
        folder: Folder | None,
        name: str,
    ) -> State:
        """Final points `x_adv` of a batch and `by`, which attack found each."""
        if folder is not None and folder.results(name) is not None:
            kept = folder.points(name)
            restore_random(kept)
            return kept
        watch = Watch()
        if folder is not None:
            watch = Watch(folder.saved(name), lambda state: folder.save(name, state))
        state, _ = watch.run(ensemble, self.target, lambda: ensemble.begin(self.target, *batch))
        found = {"x_adv": ensemble.result(state).x_adv, "by": state["by"]}
        if folder is not None:
            folder.finish(name, {"rows": []}, {**found, **random_states()})
        return found

    def _describe(
        self, ensemble: Ensemble, x: Tensor, y: Tensor, bs: int, indices: Tensor
    ) -> dict[str, Any]:
        """All that final points depend on."""
        data = {"x_orig": x, "y_orig": y, "indices": indices}
        return {
            "norm": self.norm,
            "eps": self.eps,
            "version": self.version,
            "protocol": self.protocol,
            "seed": self.seed,
            "attacks": [f"{name}: {attack}" for name, attack in ensemble.attacks],
            "bs": bs,
            **{name: state_hash({name: value}) for name, value in data.items()},
            "model": state_hash(self.target.module.state_dict()),
            "precision": self.target.precision,
            "rows": self.target.rows,
            "device": self.target.device.type,
            "environments": [environment(self.target.device)],
        }

    def _randomised(self, x: Tensor) -> bool:
        return self.target.randomised(x[:2].to(self.target.device))

    def _accuracy(self, x: Tensor, y: Tensor, bs: int, indices: Tensor, draws: int) -> float:
        exact, device, right = self.target.exact(), self.target.device, 0
        for at in range(0, len(x), bs):
            part = (values[at : at + bs].to(device) for values in (x, y, indices))
            right += int(judge(exact, *part, draws=draws, seed=self.seed).right.sum())
        return right / (draws * len(x))

    def _classes(self, x: Tensor, bs: int, indices: Tensor) -> Tensor:
        """Classes of a fresh draw, int64 ``[N]``, where `x` lies."""
        device, found = self.target.device, [torch.zeros(0, dtype=torch.int64, device=x.device)]
        for at in range(0, len(x), bs):
            keys = image_keys(self.seed, Stream.EVALUATION, indices[at : at + bs].to(device))
            logits = self.target.exact().logits(x[at : at + bs].to(device), keys)
            found.append(logits.argmax(1).to(x.device))
        return torch.cat(found)

    def _report(self, lines: list[str]) -> None:
        if self.verbose and lines:
            print("\n".join(lines))
        if self.log_path is not None and lines:
            with open(self.log_path, "a") as file:
                file.write("\n".join(lines) + "\n")


def _placed(
    model: nn.Module | Callable[[Tensor], Tensor] | Target, device: torch.device | None
) -> nn.Module | Target:
    """The model, a function as a module, after checking that it lies on `device`."""
    if not isinstance(model, (nn.Module, Target)):
        return _Forward(model, device or torch.device("cpu"))
    lies = (model if isinstance(model, Target) else Target(model)).device
    # cuda is any of its devices.
    if device is not None and (
        device.type != lies.type or device.index not in (None, lies.index or 0)
    ):
        raise ValueError(f"the model lies on {lies}, not on {device}; move it there")
    return model
