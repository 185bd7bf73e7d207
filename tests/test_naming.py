# SPDX-License-Identifier: Apache-2.0
"""Whether a file is of the same run, and how that is said."""

from __future__ import annotations

from nimfast.naming import difference


def test_the_first_difference_is_told_apart() -> None:
    old = {"n": 5, "images": list(range(100)), "seed": 1, "gone": None, "when": "then"}
    assert difference(old, {**old, "when": "now"}, {"when"}) is None
    assert difference(old, {**old, "n": 6, "seed": 2}, ()) == "n is 5 there, 6 now"
    longer = {**old, "images": list(range(101))}
    assert difference(old, longer, ()) == "images is 100 values there, 101 values now"
    other = {**old, "images": [*range(90), *range(91, 101)]}
    told = "images is 90 as number 91 there, 91 as number 91 now"
    assert difference(old, other, ()) == told
    assert difference({**old, "gone": "x"}, {"n": 5}, ()) is not None
