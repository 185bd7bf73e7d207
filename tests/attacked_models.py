# SPDX-License-Identifier: Apache-2.0
"""Small models that the tests of attacks share, and images for them."""

import torch
from torch import Tensor, nn

from nimfast.ops import corrupt

SHAPE = (3, 8, 8)


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """8-bit images that touch both ends of the range."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(-40, 296, (count, *shape), generator=draw).clamp(0, 255)
    return values.float() / 255


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        label: Tensor = model(x).argmax(1)
    return label


class Linear(nn.Module):
    """Logits linear in the pixels."""

    def __init__(self, classes: int = 10, seed: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            0.1 * torch.randn(classes, 192, generator=torch.Generator().manual_seed(seed))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T.to(x.dtype)


class Curved(Linear):
    """Not linear, cheap, and smooth."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.sin(10 * super().forward(x)) + 3 * super().forward(x)


class Noisy(Curved):
    """Gaussian noise on the input, by key; each call of forward draws from torch's generator."""

    def __init__(self, sigma: float = 0.1, **options: int) -> None:
        super().__init__(**options)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.sigma * torch.randn_like(x))

    def draw(self, x: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        noisy = corrupt(x, keys, self.sigma, samples=samples, first_sample=first_sample)
        return Curved.forward(self, noisy)
