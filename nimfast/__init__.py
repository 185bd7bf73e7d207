# SPDX-License-Identifier: Apache-2.0
"""nimfast: denoising pretraining, and fast, honest measurement of robustness."""

__version__ = "0.1.0"
