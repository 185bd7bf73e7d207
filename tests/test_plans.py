# SPDX-License-Identifier: Apache-2.0
"""Plans of the sequential test: samples, power, files, input. Errors: test_plan_errors.py."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import plan_files
import pytest
from scipy.special import betaincinv
from scipy.stats import binom, norm

from nimfast import plan as command
from nimfast.smoothing import bounds, construction, plan, plan_store, plans, recursion
from nimfast.smoothing.settings import Config, radii, radius_grid

ALPHA = plan_files.ALPHA

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
    found, images = plan_files.SMALL["four radii"](), 20_000
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


@pytest.mark.parametrize("name", plan_files.SMALL)
def test_rows_are_nested(name: str) -> None:
    found = plan_files.SMALL[name]()
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
    for amount in (2.0**-20, math.nextafter(2.0**-20, 1), math.nextafter(2.0**-20, 0)):
        assert amount <= plan(1.0, radii, n=200, slack=amount).slack <= 2 * amount


# --- files ----------------------------------------------------------------------------------------


CACHE_FOLDER = plan_store.cache_folder  # before conftest.py gives the tests one of their own


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plan_store, "cache_folder", CACHE_FOLDER)
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
    found = plan_files.SMALL["leading"]()
    assert found.probabilities[1] < construction.CONTESTED
    for j in (0, 1):
        fixed = recursion.accept_boundary(found.probabilities[j], (500,), [0.005])[0]
        assert found.accept[j, -1] == fixed[0]


@pytest.mark.parametrize(
    ("sigma", "last", "grid"),
    [
        (1.0, 2.5, tuple(0.25 * i for i in range(11))),
        (0.12, 0.3, (0, 0.25)),
        (0.1, 0.25, (0, 0.25)),
        (0.5, 0.1, (0,)),  # few samples
        (0.09, 0.225, (0, 0.0625, 0.125, 0.1875)),
        (0.05, 0.125, (0, 0.0625, 0.125)),
        (0.05, 0.02, (0,)),
        (0.5, -1.0, (0,)),
        (4.0, 10.0, tuple(0.25 * i for i in range(41))),
        (8.0, 20.0, tuple(0.5 * i for i in range(41))),
    ],
)
def test_default_radii(sigma: float, last: float, grid: tuple[float, ...]) -> None:
    assert radius_grid(sigma, last) == grid


@pytest.mark.parametrize("sigma", [1e-300, 1e-4, 0.02, 0.09, 70.0, 1e300])
def test_any_sigma_has_a_few_default_radii(sigma: float) -> None:
    asked = radii(Config(sigma=sigma), sigma, 3.199 * sigma)
    assert 3 <= len(asked) <= 41 and 1.25 * sigma <= asked[-1] <= 2.5 * sigma
