# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: what a name may say, and one clear line for what it may not."""

from __future__ import annotations

import pytest
from data_files import complaint

from nimfast.data import load


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mnist", "digits, cifar10[:DIR], imagefolder:DIR, parquet:GLOB or hf:NAME"),
        ("", "unknown data ''"),
        ("digits:8x8", "take no options"),
        ("digits?size=16", "take no options"),
        ("imagefolder", "imagefolder:DIR"),
        ("imagefolder:/no/such/folder", "no folder /no/such/folder"),
        ("parquet", "parquet:GLOB"),
        ("parquet:/no/such/*.parquet", "no file matches /no/such/*.parquet"),
        ("hf", "hf:NAME"),
        ("imagefolder:x?crop=3", "unknown option 'crop'"),
        ("imagefolder:x?size=0", "not '0'"),
        ("imagefolder:x?size=big", "not 'big'"),
        ("imagefolder:x?size=8&crop=3", "unknown option 'crop'"),
        ("imagefolder:x?decode=gpu", "decode must be cpu or cuda, not 'gpu'"),
    ],
)
def test_bad_name(spec: str, expected: str) -> None:
    assert expected in complaint(spec)


def test_digits_by_name() -> None:
    assert load("digits").shape == (1, 32, 32)
    assert "validation" in complaint("digits", "no-such-split")
