# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder (He et al., 2022), used as the denoising one of DMAE (Wu et al., 2023).

The encoder sees the patches that are kept; the decoder sees them and a mask token at every removed
place, and predicts every patch. MAE, DMAE and NIM differ only in the noise on the input, the mask
and the loss (target, region), none of which is fixed here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nimfast.models.vit import (
    Architecture,
    Encoder,
    LayerNorm,
    block,
    initialise,
)


class MAE(Encoder):
    """Encoder and decoder.

    Input: rows of the kept patches of normalised images, ``[N, K, p*p*C]``, and their places, int64
    ``[N, K]`` (None: all patches, as in NIM). Output: predicted patch rows ``[N, L, p*p*C]``.
    """

    decoder_positions: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        width = arch.decoder_width
        self.norm = LayerNorm(arch.width)
        self.decoder_embed = nn.Linear(arch.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_positions("decoder_positions", width)
        self.decoder_blocks = nn.ModuleList(
            block(width, arch.decoder_heads) for _ in range(arch.decoder_depth)
        )
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, arch.row_size)
        initialise(self)

    def forward(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rows of the kept patches -> predicted rows of all patches, see the class."""
        return self.decode(self.encode(rows, keep), keep)

    def decode(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """Encoded tokens ``[N, (1+)K, width]`` -> predicted patch rows ``[N, L, p*p*C]``."""
        first = int(self.arch.class_token)
        tokens = self.decoder_embed(self.norm(tokens))
        if keep is not None:
            seen = tokens[:, first:]
            places = keep[..., None].expand(-1, -1, seen.shape[2])
            empty = self.mask_token.to(seen.dtype).expand(len(seen), self.arch.patches, -1)
            tokens = torch.cat([tokens[:, :first], empty.scatter(1, places, seen)], 1)
        tokens = tokens + self.decoder_positions
        for layer in self.decoder_blocks:
            tokens = layer(tokens)
        rows: Tensor = self.decoder_pred(self.decoder_norm(tokens))[:, first:]
        return rows


def removed_mask(keep: Tensor, patches: int) -> Tensor:
    """Kept patches ``[N, K]`` -> mask, bool ``[N, L]``: True where the patch was removed."""
    everything = torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device)
    return everything.scatter_(1, keep, False)
