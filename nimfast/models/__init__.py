# SPDX-License-Identifier: Apache-2.0
"""Networks and their files: ViT classifier, masked autoencoder, checkpoints in and out."""

from nimfast.models.load import Classifier, load_classifier
from nimfast.models.mae import MAE, removed_mask
from nimfast.models.vit import ARCHITECTURES, Architecture, ViT, architecture, patchify, unpatchify

__all__ = [
    "ARCHITECTURES",
    "MAE",
    "Architecture",
    "Classifier",
    "ViT",
    "architecture",
    "load_classifier",
    "patchify",
    "removed_mask",
    "unpatchify",
]
