# SPDX-License-Identifier: Apache-2.0
"""Plans of the exact group-sequential test: same alpha as CERTIFY, several times fewer samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """What a sequential test decides by; online there are integer comparisons only.

    At look k the test has seen the first ``looks[k]`` samples; S of them were votes for the class.

    Attributes:
        sigma: standard deviation of the noise.
        radii: R target radii, increasing; the first may be 0.
        n: the most samples.
        alpha: bound on the probability of certifying a radius that is too large.
        looks: ``n_1 < ... < n_K = n``.
        accept: int64 ``[R, K]``: ``S >= accept[j, k]`` certifies ``radii[j]`` (n_k + 1: never).
        futile: int64 ``[R, K]``: ``S <= futile[j, k]`` gives ``radii[j]`` up (-1: never).
        error: for each radius, the exact probability of certifying it where it is just not true.
        labelled: whether the class is known beforehand; else the leading class is tested.
        slack: total variation between the noise drawn and the noise law that is allowed for.
    """

    sigma: float
    radii: tuple[float, ...]
    n: int
    alpha: float
    looks: tuple[int, ...]
    accept: NDArray[np.int64]
    futile: NDArray[np.int64]
    error: tuple[float, ...]
    labelled: bool
    slack: float
