# SPDX-License-Identifier: Apache-2.0
"""votes: counts against plain Python, ties, rows that are not finite, padding, every type."""

import math

import pytest
import torch

from nimfast.ops import use_backend, votes


def count_plainly(
    logits: torch.Tensor, counts: list[list[int]], index: list[int], valid: list[int]
) -> None:
    """The definition, one row at a time."""
    per_slot = len(logits) // len(index)
    for number, row in enumerate(logits.tolist()):
        slot, place = divmod(number, per_slot)
        if place >= valid[slot] or not 0 <= index[slot] < len(counts):
            continue
        finite = all(math.isfinite(value) for value in row)
        counts[index[slot]][row.index(max(row)) if finite else len(row)] += 1


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 17, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_definition(backend: str, device: str, dtype: torch.dtype, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(6 * 7, classes, generator=generator).to(
        dtype
    )  # low precision brings ties of its own
    logits[3, classes // 2] = float("nan")
    logits[4, classes - 1] = float("inf")
    logits[5] = float("-inf")
    logits[6] = 1.0  # all equal
    index, valid = [0, 2, 1, 2, 0, 5], [7, 7, 3, 0, 1, 7]  # slot 5 names no row of counts
    expected = [[0] * (classes + 1) for _ in range(3)]
    count_plainly(logits, expected, index, valid)
    counts = torch.zeros(3, classes + 1, dtype=torch.int64, device=device)
    with use_backend(backend):
        where = {
            "index": torch.tensor(index, device=device),
            "valid": torch.tensor(valid, device=device),
        }
        votes(logits.to(device), counts, **where)
        assert counts.tolist() == expected
        votes(logits.to(device), counts, **where)  # adds, does not overwrite
    assert counts.tolist() == [[2 * value for value in row] for row in expected]


def test_defaults_and_many_rows(backend: str, device: str) -> None:
    rows = 20_000 if backend == "native" else 2_000
    logits = torch.randn(rows, 10, generator=torch.Generator().manual_seed(0)).to(device)
    counts = torch.zeros(2, 11, dtype=torch.int64, device=device)
    with use_backend(backend):
        votes(logits, counts)
    expected = [torch.bincount(half.argmax(1), minlength=11) for half in logits.chunk(2)]
    assert torch.equal(counts, torch.stack(expected))


@pytest.mark.parametrize("classes", [9, 40])
def test_every_cpu_level(cpu_level: str, classes: int) -> None:
    logits = torch.randn(500, classes, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[::7, 3] = float("nan")
    expected = [[0] * (classes + 1)]
    count_plainly(logits, expected, [0], [500])
    counts = torch.zeros(1, classes + 1, dtype=torch.int64)
    with use_backend("native"):
        votes(logits, counts)
    assert counts.tolist() == expected


def test_empty(backend: str, device: str) -> None:
    counts = torch.zeros(0, 11, dtype=torch.int64, device=device)
    with use_backend(backend):
        votes(torch.zeros(0, 10, device=device), counts)
    assert counts.shape == (0, 11)


def test_opcheck_and_compile() -> None:
    logits = torch.randn(8, 5)
    index, valid = torch.tensor([1, 0]), torch.tensor([4, 2])
    arguments = (logits, torch.zeros(2, 6, dtype=torch.int64), index, valid)
    torch.library.opcheck(torch.ops.nimfast.votes.default, arguments)

    def function(x: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros(2, 6, dtype=torch.int64)
        votes(x, counts, index=index, valid=valid)
        return counts

    assert torch.equal(
        torch.compile(function, fullgraph=True, backend="aot_eager")(logits), function(logits)
    )


COUNTS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "counts", "options", "error", "message"),
    [
        (torch.zeros(4, 3).double(), COUNTS, {}, TypeError, "logits is torch.float64; it must be"),
        (torch.zeros(4), COUNTS, {}, ValueError, r"logits has shape \(4,\); it must be \[N, K\]"),
        (torch.zeros(4, 3), COUNTS.int(), {}, TypeError, "counts is torch.int32; it must be int64"),
        (
            torch.zeros(4, 5),
            COUNTS,
            {},
            ValueError,
            r"counts has shape \(2, 4\); it must be contiguous \[G, 6\]",
        ),
        (
            torch.zeros(5, 3),
            COUNTS,
            {},
            ValueError,
            "5 rows, which do not divide into 2 equal slots",
        ),
        (
            torch.zeros(4, 3),
            COUNTS,
            {"index": torch.zeros(2)},
            TypeError,
            "index is torch.float32; it must be int64",
        ),
        (
            torch.zeros(4, 3),
            COUNTS,
            {"valid": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"valid has shape \(3,\); it must be \[2\]",
        ),
        (
            torch.zeros(4, 3, device="meta"),
            COUNTS,
            {},
            ValueError,
            "counts is on cpu; it must be on meta",
        ),
    ],
)
def test_bad_arguments(logits, counts, options, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        votes(logits, counts, **options)
