# SPDX-License-Identifier: Apache-2.0
"""Networks and their files: ViT classifier, autoencoders, checkpoints in and out."""

from nimfast.models.load import Classifier, load_classifier
from nimfast.models.mae import MAE, removed_mask
from nimfast.models.patches import PatchModel, take
from nimfast.models.simmim import SimMIM, SimMIMArchitecture, simmim_architecture
from nimfast.models.simmim_classifier import SimMIMClassifier
from nimfast.models.vit import ARCHITECTURES, Architecture, ViT, architecture
from nimfast.ops.patches import patchify, unpatchify

__all__ = [
    "ARCHITECTURES",
    "MAE",
    "Architecture",
    "Classifier",
    "PatchModel",
    "SimMIM",
    "SimMIMArchitecture",
    "SimMIMClassifier",
    "ViT",
    "architecture",
    "load_classifier",
    "patchify",
    "removed_mask",
    "simmim_architecture",
    "take",
    "unpatchify",
]
