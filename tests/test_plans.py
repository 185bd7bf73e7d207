# SPDX-License-Identifier: Apache-2.0
"""Plans of the sequential test: their error by other algorithms, power, samples, files, bad input.

The package carries distributions from look to look by convolutions of binomials. Here the error is
computed again one sample at a time: with whole numbers of paths (exact), in 256-bit integers
rounded up (a proof for n = 10,000), in float64 with all that is dropped counted as error; or drawn.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import plan_files
import pytest
from scipy.special import betaincinv
from scipy.stats import beta, binom, norm

from nimfast import plan as command
from nimfast.smoothing import bounds, construction, plan, plan_store, plans, recursion
from nimfast.smoothing.plans import Plan

ALPHA = 0.001
SMALL = [
    plan(1.0, (0, 0.5, 1.0, 2.0), n=640, alpha=0.001),
    plan(0.5, (0, 0.3, 0.6), n=300, alpha=0.04, growth=1.5),
    plan(1.0, (0.4, 1.2), n=1000, alpha=0.2),
    plan(1.0, (0, 0.1, 0.5), n=500, alpha=0.01, labelled=False),
    plans.anytime_plan(1.0, (0, 1.0), n=640, alpha=0.01),
]


@functools.cache
def _stopping_paths(looks: tuple[int, ...], accept: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(look, successes, number of paths) where a path passes; whole numbers, whatever p is."""
    paths, low, before, found = [1], 0, 0, []
    for look, count in zip(looks, accept, strict=True):
        for _ in range(look - before):
            paths = [a + b for a, b in zip([*paths, 0], [0, *paths], strict=True)]
        before, kept = look, max(0, count - low)
        found += [(look, low + kept + i, number) for i, number in enumerate(paths[kept:])]
        paths = paths[:kept] or [0]
    return found


def _exact(p: float, looks: Sequence[int], accept: Sequence[int]) -> Fraction:
    """Error as a fraction, for a p that is a multiple of 2^-40."""
    hit, n = int(p * 2**40), looks[-1]
    assert hit == Fraction(p) * 2**40
    total = sum(
        number * hit**s * (2**40 - hit) ** (look - s) << 40 * (n - look)
        for look, s, number in _stopping_paths(tuple(looks), tuple(accept))
    )
    return Fraction(total, 1 << 40 * n)


def _rounded_up(p: float, looks: Sequence[int], accept: Sequence[int]) -> Fraction:
    """Upper bound of the error in 256-bit fixed point: what is cut off is rounded up."""
    one, bits = 1 << 256, 40
    hit = int(Fraction(p) * (1 << bits))  # p is a multiple of 2^-40
    miss, tiny = (1 << bits) - hit, one >> 120
    alive, low, crossed, before = [one], 0, 0, 0
    for look, count in zip(looks, accept, strict=True):
        for _ in range(look - before):
            alive = [
                ((a * miss + b * hit) >> bits) + 1
                for a, b in zip([*alive, 0], [0, *alive], strict=True)
            ]
            while alive[0] < tiny:
                crossed, low = crossed + alive.pop(0), low + 1
            while alive[-1] < tiny:
                crossed += alive.pop()
        before, kept = look, max(0, count - low)
        crossed += sum(alive[kept:])
        alive = alive[:kept] or [0]
        if alive == [0]:
            break
    assert hit == Fraction(p) * (1 << bits)
    return Fraction(crossed, one)


@functools.cache
def _stepwise(p: float, looks: tuple[int, ...], accept: tuple[int, ...]) -> float:
    """Error in float64, one sample at a time: 3 roundings each, so good to n * 4e-16."""
    alive, low, crossed, before = np.ones(1), 0, 0.0, 0
    for look, count in zip(looks, accept, strict=True):
        for step in range(look - before):
            grown = np.zeros(len(alive) + 1)
            grown[:-1] = alive * (1 - p)
            grown[1:] += alive * p
            alive = grown
            if step % 16 == 15:
                kept = np.nonzero(alive > 1e-30)[0]
                crossed += alive[: kept[0]].sum() + alive[kept[-1] + 1 :].sum()
                low, alive = low + kept[0], alive[kept[0] : kept[-1] + 1]
        before, kept_counts = look, max(0, count - low)
        crossed += alive[kept_counts:].sum()
        alive = alive[:kept_counts]
        if not len(alive):
            break
    return crossed


# --- error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", SMALL, ids=lambda found: f"n{found.n}")
def test_error_of_small_plans_in_exact_arithmetic(found: Plan) -> None:
    rows = list(zip(found.probabilities, found.accept.tolist(), found.error, strict=True))
    first = found.accept[0].tolist()
    for j, (p, accept, error) in enumerate(rows):
        exact = _exact(p, found.looks, accept)
        if found.labelled:
            assert exact <= Fraction(error) <= Fraction(found.alpha)
            assert error == pytest.approx(float(exact), rel=1e-8)
            continue
        lowest = found.probabilities[j - 1] if j else 0.5
        for share in (0, 0.3, 0.7, 1):
            q = math.floor((lowest + share * (p - lowest)) * 2**40) / 2**40
            total = _exact(q, found.looks, accept) + _exact(1 - q, found.looks, first)
            assert total <= Fraction(error) <= Fraction(found.alpha)


def _unique_rows(n: int) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """(p, looks, accept) of the shipped plans for a known class, each once."""
    rows = {}
    for sigma, size, labelled in plan_files.SETTINGS:
        if size == n and labelled:
            found = plan_files.shipped(sigma, n, labelled)
            for p, accept in zip(found.probabilities, found.accept.tolist(), strict=True):
                rows[p, found.looks, tuple(accept)] = None
    return list(rows)


def _check_stepwise(n: int) -> None:
    rows = _unique_rows(n)
    assert len(rows) == len(plan_files.radii(1.0, n))  # the coarser grids' rows are among them
    for p, looks, accept in rows:
        error = _stepwise(p, looks, accept)
        assert error * (1 + n * 4e-16) <= ALPHA
        computed = recursion.crossing_probability(p, looks, np.array(accept))
        assert error * (1 - n * 4e-16) <= computed <= error * (1 + 2e-9) + 1e-20


def _check_leading(n: int) -> None:
    for sigma in (0.25, 0.5, 1.0):
        found = plan_files.shipped(sigma, n, False)
        first, *others = map(tuple, found.accept.tolist())
        # docs/sequential_test.md, lemma 3, needs more than half of the votes at every look.
        assert all(2 * count > look for look, count in zip(found.looks, first, strict=True))
        assert 2 * _stepwise(0.5, found.looks, first) <= ALPHA
        lowest, highest = found.probabilities[:2]
        for share in (0.0, 0.9, 1.0):
            p = lowest + share * (highest - lowest)
            chance = _stepwise(p, found.looks, others[0]) + _stepwise(1 - p, found.looks, first)
            assert chance <= found.error[1] <= ALPHA
        assert max(found.error) <= ALPHA


def test_error_of_shipped_plans_one_sample_at_a_time() -> None:
    _check_stepwise(10_000)


def test_error_of_shipped_plans_for_the_leading_class() -> None:
    _check_leading(10_000)


@pytest.mark.slow
def test_error_of_shipped_plans_for_large_n() -> None:
    _check_stepwise(100_000)


@pytest.mark.slow
def test_error_of_shipped_plans_in_integers_rounded_up() -> None:
    for p, looks, accept in _unique_rows(10_000):
        proven = _rounded_up(p, looks, accept)
        assert proven <= Fraction(ALPHA)
        assert recursion.crossing_probability(p, looks, np.array(accept)) >= proven * (1 - 1e-20)


def _draw(found: Plan, p: float, images: int, seed: int) -> np.ndarray:
    """Rows certified, without ever giving up: int ``[images]``."""
    rng = np.random.default_rng(seed)
    successes = np.zeros(images, dtype=np.int64)
    certified, before = np.zeros(images, dtype=np.int64), 0
    for k, look in enumerate(found.looks):
        successes += rng.binomial(look - before, p, images)
        before = look
        reached = np.searchsorted(found.accept[:, k], successes, side="right")
        np.maximum(certified, reached, out=certified)
    return certified


def _check_drawn(found: Plan, rows: Sequence[int], images: int) -> None:
    """At each boundary as often wrong as computed; over all of them at most alpha; below, less."""
    wrong = {j: int((_draw(found, found.probabilities[j], images, j) > j).sum()) for j in rows}
    for j, count in wrong.items():
        assert abs(count - images * found.error[j]) < 4.5 * math.sqrt(images * found.error[j])
        below = 2 * found.probabilities[j] - (1 + found.probabilities[j]) / 2
        assert (_draw(found, below, images // 10, j) > j).sum() == 0
    total = len(rows) * images
    upper = 1 - beta.ppf(0.05, total - sum(wrong.values()), sum(wrong.values()) + 1)
    assert upper < found.alpha * 1.1


def test_drawn_error_at_and_below_a_boundary() -> None:
    _check_drawn(plan(1.0, (0, 1.0), n=2000, alpha=0.01), [0, 1], 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("n", [10_000, 100_000])
def test_drawn_error_at_and_below_every_boundary(n: int) -> None:
    found = plan_files.shipped(1.0, n, True)
    _check_drawn(found, range(len(found.radii)), 250_000)  # over three million in all


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3)])
def test_drawn_error_of_the_leading_class_where_no_class_has_a_majority(
    shares: tuple[float, ...],
) -> None:
    found, images = plan(1.0, (0, 0.1, 0.5), n=500, alpha=0.05, labelled=False), 200_000
    rng = np.random.default_rng(1)
    votes = np.zeros((images, len(shares)), dtype=np.int64)
    wrong, before = np.zeros(images, dtype=bool), 0
    for k, look in enumerate(found.looks):
        votes += rng.multinomial(look - before, shares, images)
        before = look
        wrong |= votes.max(axis=1) >= found.accept[0, k]
    assert wrong.mean() < 0.05
    if shares == (0.5, 0.5):
        assert wrong.mean() > 0.04  # both classes can be taken for one of more than 1/2


# --- what it costs, what it finds -----------------------------------------------------------------

# Of the design: r / sigma, then expected samples by p_A.
EXPECTED = {
    0: {0.5: 7669, 0.6: 558, 0.8: 71, 0.95: 34},
    1: {0.7: 100, 0.8: 542, 0.9: 876, 0.95: 228, 0.99: 105},
    2: {0.95: 302, 0.97: 1629, 0.98: 9581, 0.99: 2245, 0.999: 557},
    3: {0.99: 264, 0.995: 626, 0.9999: 7760},
}


@pytest.mark.parametrize("ratio", EXPECTED)
def test_expected_samples(ratio: int) -> None:
    found = plan(1.0, (float(ratio),))
    for p, samples in EXPECTED[ratio].items():
        assert found.outcome(p).samples == pytest.approx(samples, rel=0.02)


@pytest.mark.parametrize("n", [10_000, 100_000])
def test_power_is_within_a_point_of_the_fixed_test(n: int) -> None:
    found = plan_files.shipped(1.0, n, True)
    for j, count in enumerate(found.accept[:, -1].tolist()):
        for power in (0.5, 0.9):
            p = betaincinv(count, n - count + 1, power)  # the fixed test certifies this often
            assert found.outcome(p).reached[j + 1 :].sum() > power - 0.01
    assert found.outcome(0.9999).reached[13:].sum() == pytest.approx(
        binom.sf(found.accept[12, -1] - 1, n, 0.9999), abs=0.01
    )


def test_last_counts_are_those_of_certify() -> None:
    for sigma, n, labelled in plan_files.SETTINGS:
        found = plan_files.shipped(sigma, n, labelled)
        for radius, count in zip(found.radii, found.accept[:, -1].tolist(), strict=True):
            p = norm.cdf(radius / sigma)
            if labelled or radius > 0:
                assert (
                    bounds.lower_bound(count, n, ALPHA)
                    >= p
                    > bounds.lower_bound(count - 1, n, ALPHA)
                )
            else:
                assert bounds.lower_bound(count, n, ALPHA / 2) >= p


def test_giving_up_loses_less_than_one_percent() -> None:
    for setting in plan_files.SETTINGS:
        assert max(plan_files.shipped(*setting).loss) < 0.01


@functools.cache
def _orders(count: int, images: int) -> np.ndarray:
    """Successes among the first samples of random orders of `count` successes in 640."""
    rng = np.random.default_rng(0)
    samples = np.tile(np.arange(640) < count, (images, 1))
    return rng.permuted(samples, axis=1).cumsum(axis=1)


@pytest.mark.parametrize("j", range(4))
def test_whatever_certify_finds_is_found_but_for_what_is_given_up(j: int) -> None:
    found, images = SMALL[0], 20_000
    count = int(found.accept[j, -1])
    at_looks = _orders(count, images)[:, np.asarray(found.looks) - 1]
    level, stopped = np.zeros(images, dtype=int), np.zeros(images, dtype=bool)
    for k in range(len(found.looks)):
        now = np.searchsorted(found.accept[:, k], at_looks[:, k], side="right")
        level = np.where(stopped, level, np.maximum(level, now))
        following = np.append(found.futile[:, k], 641)
        stopped |= at_looks[:, k] <= following[level]
    lost = (level <= j).mean()
    assert lost <= 0.01
    # `loss` counts paths given up after they passed as well, so it is an upper bound.
    assert lost <= found.loss[j] + 4 * math.sqrt(found.loss[j] / images)


def test_outcome_of_one_row_is_its_crossing_probability() -> None:
    found = plan(1.0, (1.0,), n=2000)
    never = np.full_like(found.futile, -1)
    for p in (0.8, found.probabilities[0], 0.87):
        reached = recursion.outcome(p, found.looks, found.accept, never).reached
        crossing = recursion.crossing_probability(p, found.looks, found.accept[0])
        assert reached[1] == pytest.approx(crossing, rel=1e-8)
        assert reached.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("found", SMALL, ids=lambda found: f"n{found.n}")
def test_rows_are_nested(found: Plan) -> None:
    assert (np.diff(found.accept, axis=0) >= 0).all()
    assert (np.diff(found.futile, axis=0) >= 0).all()
    assert (found.futile < found.accept).all()
    assert found.looks[-1] == found.n
    assert not found.accept.flags.writeable


def test_slack_moves_the_hypotheses_up() -> None:
    radii = (0, 1.0)
    plain, slack = plan(1.0, radii, n=2000), plan(1.0, radii, n=2000, slack=1e-3)
    assert 1e-3 <= slack.slack < 2e-3
    for radius, p, q in zip(radii, plain.probabilities, slack.probabilities, strict=True):
        assert 0 < p - norm.cdf(radius) < 1e-9
        assert q - norm.cdf(radius) >= 1e-3
    assert (slack.accept[:, -1] > plain.accept[:, -1]).all()
    assert plan(1.0, radii, n=2000, slack=2.5e-11) is plain  # ImageNet's, allowed for in any case


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans._plan.cache_clear()
    return tmp_path / "nimfast" / "plans"


def _no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("this plan was to come from a file")

    monkeypatch.setattr(plans, "build", build)


def test_shipped_plans_need_no_building(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_building(monkeypatch)
    for setting in plan_files.SETTINGS:
        assert max(plan_files.shipped(*setting).error) <= ALPHA
    assert not cache.exists()


def test_shipped_plans_and_their_table_are_what_is_built_now() -> None:
    assert json.loads(plan_store.SHIPPED.read_text()) == plan_files.fresh()
    assert plan_files.BEGIN + plan_files.table() + plan_files.END in plan_files.DOCS.read_text()


def test_other_plans_are_kept_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(0.3, (0, 0.2), n=700)
    (path,) = cache.iterdir()
    _no_building(monkeypatch)
    plans._plan.cache_clear()
    again = plan(0.3, (0, 0.2), n=700)
    assert again is not first
    assert (again.accept == first.accept).all() and (again.futile == first.futile).all()
    assert path.suffix == ".json"


def _damage(content: dict[str, list[list[int]]], how: str) -> str:
    if how == "torn":
        return json.dumps(content)[:50]
    if how == "too generous":  # counts that would certify too much: the error gives it away
        content["accept"][1][0] = 28
    elif how == "other shape":
        content["futile"].pop()
    return json.dumps([content] if how == "other type" else content)


@pytest.mark.parametrize("how", ["torn", "too generous", "other shape", "other type"])
def test_a_damaged_file_is_replaced(cache: Path, how: str) -> None:
    first = plan(0.3, (0, 0.2), n=700)
    (path,) = cache.iterdir()
    sound = path.read_text()
    path.write_text(_damage(json.loads(sound), how))
    plans._plan.cache_clear()
    again = plan(0.3, (0, 0.2), n=700)
    assert (again.accept == first.accept).all() and max(again.error) <= 0.001
    assert path.read_text() == sound


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "file"))
    assert max(plan(0.3, (0, 0.2), n=700).error) <= 0.001


# --- input, view ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(radii=(0, 1.0, 0.5)), "increasing"),
        (dict(radii=(0, 0)), "increasing"),
        (dict(radii=(-0.1, 1)), "increasing"),
        (dict(radii=(math.nan,)), "increasing"),
        (dict(radii=()), "increasing"),
        (dict(radii=(0, 1.0, 3.3)), r"radius 3\.3 has no plan.*up to 3\.\d+"),
        (dict(radii=(0, math.inf)), "radius inf has no plan"),
        (dict(alpha=0.5), "alpha"),
        (dict(alpha=0.0), "alpha"),
        (dict(n=9), "n = 9 is too small.*at least 10"),
        (dict(n=10, radii=(0, 1.0)), "radius 1 has no plan"),
        (dict(n=10**8), "at most"),
        (dict(n=10, labelled=False, radii=(0,)), "at least 11"),
        (dict(sigma=0.0), "sigma"),
        (dict(growth=1.0), "growth"),
        (dict(slack=0.2), "slack"),
        (dict(slack=-1e-9), "slack"),
    ],
)
def test_bad_input(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan(**{"sigma": 1.0, "radii": (0, 1.0), **arguments})  # type: ignore[arg-type]
    if "growth" not in arguments:
        with pytest.raises(ValueError, match=says):
            plans.anytime_plan(**{"sigma": 1.0, "radii": (0, 1.0), "n": 10_000, **arguments})  # type: ignore[arg-type]


def test_the_largest_radius_that_is_named_has_a_plan() -> None:
    for n, alpha in ((10_000, 0.001), (10, 0.001), (500, 0.05)):
        with pytest.raises(ValueError, match="has no plan") as error:
            plan(0.5, (0, 9.0), n=n, alpha=alpha)
        largest = float(str(error.value).split("up to ")[1].split(";")[0])
        assert max(plan(0.5, (largest,), n=n, alpha=alpha).error) <= alpha
        with pytest.raises(ValueError, match="has no plan"):
            plan(0.5, (largest + 1.01e-4,), n=n, alpha=alpha)


def test_extreme_settings_keep_their_error() -> None:
    for n, alpha, radii in ((10, 0.001, (0.0,)), (2000, 1e-9, (0, 1.0)), (333, 0.49, (0, 2.0))):
        found = plan(1.0, radii, n=n, alpha=alpha)
        for p, accept in zip(found.probabilities, found.accept.tolist(), strict=True):
            assert _stepwise(p, found.looks, tuple(accept)) <= alpha


def test_a_plan_shows_what_it_does() -> None:
    text = str(plan_files.shipped(0.5, 10_000, True))
    assert "n 10,000, alpha 0.001, 36 looks, label known" in text
    assert "5,156" in text and "0.999999" in text and "7,669" in text and "5155:5156" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.command(["--sigma", "1", "--n", "1000", "--radii", "0", "1", "--no-labelled"])
    assert done.value.code == 0
    assert "leading class" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        command.command(["--radii", "0", "2"])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: radius 2 has no plan")


def test_construction_shares_alpha_where_it_must() -> None:
    # Rows below 0.55 have half of alpha: their last count is CERTIFY's at alpha / 2.
    found = SMALL[3]
    assert found.probabilities[1] < construction.CONTESTED
    for j in (0, 1):
        fixed = recursion.accept_boundary(found.probabilities[j], (500,), [0.005])[0]
        assert found.accept[j, -1] == fixed[0]
