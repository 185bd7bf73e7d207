# SPDX-License-Identifier: Apache-2.0
"""Classifier on a SimMIM encoder (Xie et al., 2022, section 4.1): the mean of its patch tokens."""

from __future__ import annotations

from torch import Tensor, nn

from nimfast.models.patches import PatchModel
from nimfast.models.simmim import SimMIMArchitecture, initialise, make_encoder
from nimfast.models.vit import LayerNorm


class SimMIMClassifier(PatchModel):
    """Encoder, mean of the patch tokens, linear head.

    A ViT's last norm gives way to one of the mean, as in BEiT (Bao et al., 2022); a Swin's norm
    stays before the mean. The mask token is left out.

    Input: normalised images ``[N, C, H, W]``, or all their patch rows; output: logits
    ``[N, classes]``.

    Args:
        arch: see `SimMIMArchitecture`.
        num_classes: length of the logits.
        drop_path: stochastic depth rate of the last block.
        batch_norm: a linear probe: the encoder's own norm stays, and a batch norm without weights
            stands before the head.
    """

    arch: SimMIMArchitecture

    def __init__(
        self,
        arch: SimMIMArchitecture,
        num_classes: int,
        drop_path: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.arch, self.num_classes = arch, num_classes
        width = arch.widths[-1]
        self.encoder = make_encoder(arch, drop_path)
        self.encoder.mask_token = None
        self.fc_norm: nn.Module | None = None
        if arch.window is None and not batch_norm:
            self.encoder.norm = nn.Identity()
            self.fc_norm = LayerNorm(width)
        self.batch_norm = nn.BatchNorm1d(width, eps=1e-6, affine=False) if batch_norm else None
        self.head = nn.Linear(width, num_classes)
        initialise(self)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, C, H, W]``, or all their rows ``[N, L, p*p*C]``, -> logits."""
        rows = self.rows(images) if images.dim() == 4 else images
        logits: Tensor = self.head(self.features(rows))
        return logits

    def features(self, rows: Tensor) -> Tensor:
        """All patch rows ``[N, L, p*p*C]`` -> what the head sees, ``[N, width]``."""
        pooled: Tensor = self.encoder(rows, None).mean(1)
        if self.fc_norm is not None:
            pooled = self.fc_norm(pooled)
        return pooled if self.batch_norm is None else self.batch_norm(pooled)
