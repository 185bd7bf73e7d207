# SPDX-License-Identifier: Apache-2.0
"""votes against the published lines.

pytest benchmarks/bench_votes.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import torch
from timing import backend_of, report, run

from nimfast.ops import use_backend, votes

SAMPLES = 1000


@pytest.mark.parametrize("who", ["published", "nimfast", "triton"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_votes(benchmark, device, finish, classes: int, who: str) -> None:  # type: ignore[no-untyped-def]
    """Counting 1,000 rows of logits."""
    benchmark.group = f"votes {SAMPLES} x {classes}"
    logits = torch.randn(SAMPLES, classes, device=device)
    if who == "published":
        run(benchmark, finish, lambda: published.votes(logits, classes))
    else:
        backend = backend_of(who, "votes", device)
        counts = torch.zeros(1, classes + 1, dtype=torch.int64, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        valid = torch.full((1,), SAMPLES, device=device)
        with use_backend(backend):
            run(benchmark, finish, lambda: votes(logits, counts, index=index, valid=valid))
    report(benchmark, device, logits.nbytes)
