# SPDX-License-Identifier: Apache-2.0
"""The model under attack: how its logits, losses and input gradients are taken.

Weights are frozen and modules in eval mode while it is called, and as before afterwards. The draws
of a randomised model (expectation over transformation, EOT; Athalye et al. 2018) are rows of one
batch, and batches are cut into pieces that fit cache and memory. Nothing here waits for a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nimfast.ops import vote_loss
from nimfast.packed import can_pack_any
from nimfast.runtime import DTYPES, prepare

# (logits [B * S, K], labels [B], targets [B] or None) -> value [B], differentiable
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Look(NamedTuple):
    """What a look at B images with S draws of each saw.

    Attributes:
        loss: mean over the draws, fp32 ``[B]``.
        gradient: of the loss with respect to the images, fp32 like them; empty where not asked for.
        logits: fp32 ``[B * S, K]``, the draws of an image next to each other.
        missed: misclassified draws, int64 ``[B]``.
    """

    loss: Tensor
    gradient: Tensor
    logits: Tensor
    missed: Tensor


class _Question(NamedTuple):
    """What is asked of the model at some images; see `Target.gradient`."""

    loss: str | Loss
    y: Tensor | None
    targets: Tensor | None
    keys: Tensor | None
    samples: int
    first_sample: int
    gradient: bool = False

    def of(self, part: slice, fill: int) -> _Question:
        """The question for some of the images, the last one `fill` times more."""
        y, targets, keys = (
            None if value is None else _filled(value[part], fill)
            for value in (self.y, self.targets, self.keys)
        )
        return self._replace(y=y, targets=targets, keys=keys)


class Target:
    """A classifier as attacks see it.

    Args:
        model: images ``[N, C, H, W]``, fp32 in [0, 1], to logits ``[N, K]``; normalisation belongs
            inside. Where it has `draw(images, keys, samples, first_sample)` with logits
            ``[N * samples, K]``, as our defences do, its noise belongs to the image (*keyed*), and
            no result depends on how images are batched. Any other randomised model is called again.
        rows: rows of every batch (images times draws). Batches are then filled up to one fixed
            shape, because matrix products round differently in other shapes. None: a size that
            suits the machine, never filled up, and halved where a GPU's memory does not hold it.
        precision: "fp32" uses the module as it is; "bf16" a copy made now. Logits, losses and the
            sum of gradients over draws are fp32 in both.
        packed: on a CPU, use a copy made now also for fp32, whose transformer layers are laid out
            for the processor (`nimfast.packed`): faster, the same within rounding, and deaf to
            later changes of the module. Without such layers, the module as it is.

    Attributes:
        prepared: the module that is called, in its precision `dtype`.
        keyed: whether it has `draw`.
        rows_at_once: rows of a batch where `rows` is None.
        gradients: rows that went forward and backward so far.
        forwards: rows that went forward only.

    Raises:
        TypeError: the model is no module.
        ValueError: rows less than 1.
        UserError: a precision that the device does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        packed: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; it must be a torch module")
        if rows is not None and rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        self.module = model
        self.rows = rows
        self.precision = precision
        weight = next(model.parameters(), next(model.buffers(), None))
        self.device = torch.device("cpu") if weight is None else weight.device
        self.prepared = model
        self.dtype = torch.float32
        self.packed = packed and self.device.type == "cpu" and can_pack_any(model)
        if precision != "fp32" or self.packed:
            self.prepared = prepare(model, self.device, precision)
            self.dtype = DTYPES[precision]
        self.keyed = callable(getattr(self.prepared, "draw", None))
        self.gradients = self.forwards = 0
        self._weights = list(self.prepared.parameters())
        self._modules = list(self.prepared.modules())
        # Of the module as it was: packed layers hold their weights elsewhere.
        self.rows_at_once = _default_rows(list(model.parameters()), self.device)
        self._classes: int | None = None
        self._exact: Target | None = None

    def exact(self) -> Target:
        """The same model in fp32, which has the last word on every point."""
        if self.precision == "fp32":
            return self
        if self._exact is None:
            self._exact = Target(self.module, rows=self.rows, packed=self.packed)
        return self._exact

    def classes(self, x: Tensor) -> int:
        """Number of classes K; the first call looks at what the model returns for these images.

        Raises:
            ValueError: the model does not return logits ``[N, K]``, or K is less than 2.
        """
        if self._classes is None:
            keys = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            logits = self.logits(x, keys)
            if logits.shape[1] < 2:
                raise ValueError(
                    f"the model must return a logit for each of two or more classes, not "
                    f"{logits.shape[1]}; of one logit z make two, 0 and z"
                )
            self._classes = logits.shape[1]
            sums = logits.sum(1)
            if bool(((logits >= 0).all() & ((sums - 1).abs() < 1e-3).all()).item()):
                warnings.warn(
                    "the model returns probabilities, not logits: losses saturate and gradients "
                    "vanish, so that it seems more robust than it is; leave its softmax out",
                    stacklevel=2,
                )
        return self._classes

    def randomised(self, x: Tensor) -> bool:
        """Whether 16 draws for each of these images, in two calls, give different logits."""
        if not len(x):
            return False
        keys = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        calls = [self.logits(x, keys, 8, first) for first in (0, 8)]
        draws = torch.cat([call.view(len(x), 8, -1) for call in calls], 1)
        # Rounding may depend on the place in a batch, and on a GPU on the order of adding.
        return not torch.allclose(draws, draws[:, :1], rtol=1e-4, atol=1e-5, equal_nan=True)

    def logits(
        self, x: Tensor, keys: Tensor | None = None, samples: int = 1, first_sample: int = 0
    ) -> Tensor:
        """Logits without a gradient, fp32 ``[B * S, K]``; arguments as in `gradient`."""
        return self._retried(x, _Question("", None, None, keys, samples, first_sample)).logits

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        loss: str | Loss = "ce",
        *,
        targets: Tensor | None = None,
        keys: Tensor | None = None,
        samples: int = 1,
        first_sample: int = 0,
    ) -> Look:
        """As `gradient`, without the gradient."""
        return self._retried(x, _Question(loss, y, targets, keys, samples, first_sample))

    def gradient(
        self,
        x: Tensor,
        y: Tensor,
        loss: str | Loss = "ce",
        *,
        targets: Tensor | None = None,
        keys: Tensor | None = None,
        samples: int = 1,
        first_sample: int = 0,
    ) -> Look:
        """Mean loss of each image over its draws and its gradient.

        Args:
            x: images, fp32 ``[B, C, H, W]``.
            y: labels, int64 ``[B]``.
            loss: a loss of `vote_loss`, or a function of (logits, y, targets).
            targets: int64 ``[B]``, for losses that have one.
            keys: one per image, from `image_keys`; what decides the noise of a keyed model.
            samples: S, draws of the model per image.
            first_sample: number of the first draw.

        Raises:
            ValueError: the model's logits have no gradient with respect to the images, or another
                shape than ``[B * S, K]``.
        """
        return self._retried(x, _Question(loss, y, targets, keys, samples, first_sample, True))

    def _retried(self, x: Tensor, question: _Question) -> Look:
        while True:
            try:
                return self._look(x, question)
            except torch.OutOfMemoryError:
                if self.rows is not None or self.rows_at_once == 1:
                    raise
                self.rows_at_once //= 2

    def _look(self, x: Tensor, question: _Question) -> Look:
        batch, draws = self._shape(len(x), question.samples)
        pieces = []
        for at in range(0, len(x), batch):
            count = min(batch, len(x) - at)
            fill = batch - count if self.rows is not None else 0
            images, asked = x, question
            if count < len(x) or fill:
                part = slice(at, at + count)
                images, asked = _filled(x[part], fill), question.of(part, fill)
            pieces.append(self._piece(images, asked, draws, count))
        if len(pieces) == 1:
            return pieces[0]
        if pieces:
            return Look(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        nothing = torch.zeros(0, device=x.device)
        return Look(nothing, torch.zeros_like(x), nothing.view(0, 0), nothing.long())

    def _piece(self, images: Tensor, asked: _Question, draws: int, count: int) -> Look:
        """The answer for the first `count` of these images, a few draws at a time."""
        loss: Tensor | None = None
        missed: Tensor | None = None
        gradient: Tensor | None = None
        logits = []
        with self._frozen(), torch.set_grad_enabled(asked.gradient):
            for first in range(0, asked.samples, draws):
                now = min(draws, asked.samples - first)
                leaf = images.detach().requires_grad_(asked.gradient)
                out = self._call(leaf, asked.keys, now, asked.first_sample + first)
                logits.append(out.detach().view(-1, now, out.shape[1])[:count])
                if asked.gradient:
                    self.gradients += count * now
                else:
                    self.forwards += count * now
                if asked.y is None:
                    continue
                value, wrong = evaluate(out, asked.y, asked.loss, asked.targets)
                share = now / asked.samples
                loss = _plus(loss, value.detach()[:count], share)
                missed = _plus(missed, wrong[:count], 1)
                if asked.gradient:
                    # Autograd may return an expanded number, or another layout.
                    slope = _derivative(value, leaf)[:count].contiguous()
                    gradient = _plus(gradient, slope, share)
        if loss is None or missed is None:
            loss = torch.zeros(count, device=images.device)
            missed = torch.zeros_like(loss, dtype=torch.int64)
        if gradient is None:
            gradient = images.new_empty(0)
        of_draws = torch.cat(logits, 1) if len(logits) > 1 else logits[0]
        return Look(loss, gradient, of_draws.flatten(0, 1), missed)

    def _shape(self, images: int, samples: int) -> tuple[int, int]:
        """Images and draws of one piece."""
        rows = self.rows or self.rows_at_once
        draws = min(samples, rows)
        batch = rows // draws
        if self.rows is None:  # even pieces, none nearly empty
            batch = -(-images // max(1, -(-images // batch)))
        return max(1, batch), draws

    def _call(self, x: Tensor, keys: Tensor | None, samples: int, first: int) -> Tensor:
        if self.keyed:
            if keys is None:
                raise ValueError("the model draws by key, and no keys were given; see image_keys")
            out = self.prepared.draw(x, keys, samples, first)  # type: ignore[operator]
        else:
            rows = x if samples == 1 else x[:, None].expand(-1, samples, *x.shape[1:]).flatten(0, 1)
            out = self.prepared(rows.to(self.dtype))
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) * samples:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the model must return logits [{len(x) * samples}, classes], not {found}"
            )
        return out.float()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Eval mode and no gradients for weights inside; afterwards as it was."""
        training = [module for module in self._modules if module.training]
        trained = [weight for weight in self._weights if weight.requires_grad]
        if training:
            self.prepared.eval()
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for weight in trained:
                weight.requires_grad_(True)


def evaluate(
    logits: Tensor, labels: Tensor, loss: str | Loss, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean loss of each image and how many of its draws are misclassified, from ``[B * S, K]``."""
    if isinstance(loss, str):
        return vote_loss(logits, labels, loss=loss, targets=targets)
    return loss(logits, labels, targets), vote_loss(logits.detach(), labels)[1]


def _derivative(value: Tensor, x: Tensor) -> Tensor:
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the model's logits have no gradient with respect to the images (is there a no_grad, "
            "detach, round or argmax inside?); use Square, which needs none"
        )
    return gradient


def _plus(total: Tensor | None, part: Tensor, share: float) -> Tensor:
    """A sum so far and a share of one more part; the first whole part is not even copied."""
    part = part if share == 1 else part * share
    return part if total is None else total + part


def _filled(rows: Tensor, fill: int) -> Tensor:
    """The rows and `fill` more of the last one."""
    return torch.cat([rows, rows[-1:].expand(fill, *rows.shape[1:])]) if fill else rows


def _default_rows(weights: list[nn.Parameter], device: torch.device) -> int:
    """Rows of a batch where none are asked for.

    On a CPU activations should stay in the cache; see `nimfast.smoothing.engine`.
    """
    if device.type != "cpu":
        return 1024
    return min(512, max(32, 2**27 // max(1, sum(weight.numel() for weight in weights))))
