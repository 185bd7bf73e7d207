# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix: timm's law, whatever a batch is cut into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from nimfast.errors import UserError
from train.mixing import Mix, Mixing


def test_mixing_is_that_of_timm() -> None:
    """Shares are Beta, boxes have uniform centres and sides sqrt(1 - share) before they are cut."""
    indices = torch.arange(4000)
    for alpha in (0.8, 0.2):
        mix = Mixing(mixup=alpha, mix_mode="elem").draw(0, 0, indices, 0, (16, 24))
        assert mix is not None
        assert kstest(mix.share[:, 0].numpy(), beta(alpha, alpha).cdf).pvalue > 1e-3
        torch.testing.assert_close(mix.weight[:, 0, 0], mix.share[:, 0])
    cut = Mixing(cutmix=1.0, mix_mode="elem").draw(0, 0, indices, 0, (64, 96))
    assert cut is not None
    inside = cut.weight == 0
    area = inside.double().mean((1, 2))
    torch.testing.assert_close(1 - area, cut.share[:, 0].double(), rtol=0, atol=1e-6)
    from timm.data.mixup import cutmix_bbox_and_lam

    np.random.seed(0)
    theirs = [cutmix_bbox_and_lam((1, 1, 64, 96), np.random.beta(1.0, 1.0))[1] for _ in range(4000)]
    assert kstest(area.numpy(), 1 - np.array(theirs)).pvalue > 1e-3
    down = inside.any(2).double().argmax(1)[area > 0]
    assert kstest(down.numpy(), _tops(4000)).pvalue > 1e-3
    both = Mixing(mixup=0.8, cutmix=1.0, mix_probability=0.6, mix_switch=0.25, mix_mode="elem")
    drawn = both.draw(1, 0, indices, 0, (32, 32))
    assert drawn is not None
    binary = ((drawn.weight == 0) | (drawn.weight == 1)).all(2).all(1)
    alone = (drawn.weight == 1).all(2).all(1)
    assert (~binary).double().mean().item() == pytest.approx(0.6 * 0.75, abs=0.03)
    assert (binary & ~alone).double().mean().item() == pytest.approx(0.6 * 0.25, abs=0.03)


def _tops(count: int) -> np.ndarray:
    from timm.data.mixup import cutmix_bbox_and_lam

    np.random.seed(1)
    boxes = [cutmix_bbox_and_lam((1, 1, 64, 96), np.random.beta(1.0, 1.0))[0] for _ in range(count)]
    return np.array([top for top, bottom, left, right in boxes if top < bottom and left < right])


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_a_batch_is_mixed_the_same_however_it_is_cut(mode: Any) -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0, mix_mode=mode, mix_probability=0.8)
    images, indices = torch.rand(8, 2, 3, 8, 8), torch.tensor([5, 3, 9, 1, 0, 7, 2, 8])
    labels = torch.eye(8)
    kinds = set()
    for step in range(12):
        whole = mixing.draw(3, step, indices, step, (8, 8))
        parts = [mixing.draw(3, step, indices[i : i + 4], step, (8, 8)) for i in (0, 4)]
        if whole is None:
            assert parts == [None, None]
            continue
        kinds.add(whole.weight.shape[1])
        mixed = whole.images(images.flatten(0, 1), copies=2)
        targets = whole.targets(labels)
        for i, part in zip((0, 4), parts, strict=True):
            own = images[i : i + 4].flatten(0, 1)
            got = part.images(own, copies=2) if part else own
            torch.testing.assert_close(got, mixed[2 * i : 2 * i + 8])
            wanted = part.targets(labels[i : i + 4]) if part else labels[i : i + 4]
            torch.testing.assert_close(wanted, targets[i : i + 4])
        # By hand, for image 2 and its neighbour 3, copy 1.
        row = 0 if mode == "batch" else 2
        weight, share = whole.weight[row], whole.share[row]
        expected = weight * images[2, 1] + (1 - weight) * images[3, 1]
        torch.testing.assert_close(mixed[5], expected)
        torch.testing.assert_close(targets[2], share * labels[2] + (1 - share) * labels[3])
    assert kinds == ({1, 8} if mode == "batch" else {8})  # mixup alone needs no map of weights


def test_odd_halves_are_refused() -> None:
    with pytest.raises(UserError, match="pairs images, but 3"):
        Mixing(mixup=1.0).draw(0, 0, torch.arange(3), 0, (4, 4))
    assert Mixing(mixup=1.0, mix_probability=0.0).draw(0, 0, torch.arange(3), 0, (4, 4)) is None
    assert isinstance(Mixing(mixup=1.0).draw(0, 0, torch.arange(4), 0, (4, 4)), Mix)
