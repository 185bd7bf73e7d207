# SPDX-License-Identifier: Apache-2.0
"""The recipes' optimisers: rates by the schedule, groups by depth, bad gradients skipped."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn

from nimfast.errors import UserError
from train.settings import Settings
from train.sharding import is_shared, local, shared_like, whole

PATIENCE = 10  # steps in a row without finite gradients before a run gives up


def cosine(progress: float, epochs: float, warmup: float, lr: float, min_lr: float) -> float:
    """Learning rate at `progress` (epochs and fractions): linear warm-up, then half a cosine."""
    if progress < warmup:
        return lr * progress / warmup
    done = (progress - warmup) / (epochs - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def multistep(
    progress: float, epochs: float, warmup: float, lr: float, milestones: tuple[float, ...]
) -> float:
    """The same with a tenth of the rate after each of `milestones`, shares of the epochs."""
    if progress < warmup:
        return lr * progress / warmup
    passed = sum(progress >= share * epochs for share in milestones)
    return float(lr * 0.1**passed)


def learning_rate(settings: Settings, progress: float) -> float:
    """The rate at `progress` epochs by the settings' schedule."""
    s = settings
    peak = s.lr * s.batch_size / s.lr_batch
    if s.schedule == "multistep":
        return multistep(progress, s.epochs, s.warmup, peak, s.milestones)
    return cosine(progress, s.epochs, s.warmup, peak, s.min_lr)


# Names of an encoder's blocks (a Swin's stand in stages), and of what lies before them all.
_BLOCK = re.compile(r"((?:encoder\.)?(?:stages\.\d+\.)?)blocks\.\d+")
_DOWNSAMPLE = re.compile(r"((?:encoder\.)?stages\.\d+\.)downsample\.")
_EMBEDDING = re.compile(r"(?:encoder\.)?(?:patch_embed|embed_norm|cls_token)\b")


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups: `scale` is layer_decay to the number of blocks above (head 0, embedding most).

    Parameters with fewer than two dimensions, learned tokens and tables of relative positions have
    no weight decay; frozen ones are left out.
    """
    names = [name for name, _ in model.named_modules() if _BLOCK.fullmatch(name)]
    number = {name: place + 1 for place, name in enumerate(names)}
    top = len(names) + 1

    def layer_of(name: str) -> int:
        if block := _BLOCK.match(name):
            return number[block[0]]
        if merging := _DOWNSAMPLE.match(name):  # goes with the block it feeds
            return number[f"{merging[1]}blocks.0"]
        return 0 if _EMBEDDING.match(name) else top

    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name)
        exempt = name.endswith("_token") or "relative_position_bias" in name
        groups.setdefault((layer, parameter.ndim > 1 and not exempt), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "scale": layer_decay ** (top - layer),
        }
        for (layer, decays), parameters in groups.items()
    ]


def _optimizer(groups: list[dict[str, Any]], settings: Settings) -> Any:
    s = settings
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=s.betas, fused=True)
    if s.optimizer == "sgd":
        shared = any(is_shared(weight) for group in groups for weight in group["params"])
        fused = not shared  # for shared weights torch has no fused SGD
        return torch.optim.SGD(groups, lr=0.0, momentum=s.momentum, fused=fused)
    # Biases and norms keep the plain rate; timm otherwise adapts only what decays.
    for group in groups:
        group["always_adapt"] = all(parameter.ndim > 1 for parameter in group["params"])
    return Lars(groups, lr=0.0, momentum=s.momentum)


class Optimizer:
    """The optimiser, clipping and the moving average of the weights.

    A step whose gradient is not finite changes nothing. Whether that happened is known on the
    device alone, in `counts`, so that no step waits for it.

    Args:
        model: what is trained; its processes may share the weights (see `train.sharding`).
        settings: rates, decay, clipping.
        device: of the model.
        average: the averaged model, a copy of `model` at the start; None without ``--ema``.

    Attributes:
        counts: int64 ``[3]``: steps skipped, in a row just now, most in a row.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        device: torch.device,
        average: nn.Module | None = None,
    ) -> None:
        groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
        self.inner = _optimizer(groups, settings)
        self.fused = self.inner.defaults.get("fused", False)
        self.clip = settings.clip
        self.decay = settings.ema
        self.weights: list[Tensor] = [p for group in groups for p in group["params"]]
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.shadows: list[Tensor] = []
        if average is not None:
            places = {id(p): name for name, p in model.named_parameters()}
            shadows = dict(average.named_parameters())
            self.shadows = [local(shadows[places[id(p)]]) for p in self.weights]

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Descend by `rate` and clear the gradients; True (on the device) if it was skipped."""
        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        bad = norm.isfinite().logical_not()
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.clip, norm)
        for group in self.inner.param_groups:
            group["lr"] = rate * group["scale"]
        if self.fused:
            # The flag by which torch's GradScaler tells a fused optimiser to do nothing.
            self.inner.found_inf = bad.float()
            self.inner.step()
        elif not bad:  # waits for the device
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        if self.shadows:
            weights = [local(weight) for weight in self.weights]
            torch._foreach_lerp_(self.shadows, weights, 1 - self.decay)
        skipped, streak, longest = self.counts.unbind()
        streak = (streak + 1) * bad
        self.counts = torch.stack([skipped + bad, streak, torch.maximum(longest, streak)])
        return bad

    def skipped(self) -> int:
        """Steps skipped so far; waits for the device.

        Raises:
            UserError: too many in a row.
        """
        skipped, _, longest = self.counts.tolist()
        if longest >= PATIENCE:
            raise UserError(
                f"the gradients were not finite in {PATIENCE} steps in a row; lower --lr, or "
                "--precision fp32, or limit them by --clip 1"
            )
        return int(skipped)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on; the average's weights are saved on their own."""
        inner = self.inner.state_dict()
        moments = {
            place: {name: whole(value) for name, value in entry.items()}
            for place, entry in inner["state"].items()
        }
        return {"inner": {**inner, "state": moments}, "counts": self.counts}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        inner = state["inner"]
        moments = {
            place: {name: shared_like(value, self.weights[place]) for name, value in entry.items()}
            for place, entry in inner["state"].items()
        }
        # Rates and the like follow from the settings; whether steps are fused, from the sharing.
        groups = self.inner.state_dict()["param_groups"]
        self.inner.load_state_dict({"param_groups": groups, "state": moments})
        self.counts.copy_(state["counts"])
