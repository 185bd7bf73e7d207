# SPDX-License-Identifier: Apache-2.0
"""What every command line shares: exit codes, one line for an error, one for a warning."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from nimfast import cli
from nimfast.errors import UserError
from nimfast.parsing import Number, number


@dataclass
class Options:
    """A command of the tests."""

    what: str = "nothing"
    samples: int = 3
    """a number with a text of some length, which a narrow terminal breaks into several lines"""
    radii: tuple[Number, ...] | None = None
    shuffle: bool = False
    law: Literal["gaussian", "grid"] = "gaussian"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), ("1/4", 0.25), ("64/255", 64 / 255), ("-1/2", -0.5), ("1/0", None),
     ("1/", None), ("/4", None), ("1/2/3", None), ("a", None)],
)  # fmt: skip
def test_numbers_and_fractions(text: str, value: float | None) -> None:
    if value is not None:
        assert number(text) == value
        return
    with pytest.raises(ValueError, match="could not convert|divides by zero"):
        number(text)


@dataclass
class Needing:
    """A command that needs to be told something."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    model: str
    """a classifier"""


def command(options: Options) -> None:
    if options.what == "radii":
        assert options.radii == (0, 0.25, 0.5)
    if options.what == "warn":
        warnings.warn("half the images\nare grey", stacklevel=1)
    elif options.what == "err":
        raise UserError("no image at x; check the path")
    elif options.what == "interrupt":
        raise KeyboardInterrupt
    elif options.what == "bug":
        raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("nothing", 0, ""),
        ("warn", 0, "warning: half the images are grey"),
        ("err", 2, "error: no image at x; check the path"),
        ("interrupt", 130, "error: interrupted; type it again"),
        ("bug", 1, "error: unexpected ZeroDivisionError: by zero (run again with --debug)"),
    ],
)
def test_ends(capsys: pytest.CaptureFixture[str], what: str, code: int, line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(command, Options, "x", "A test.", ["--what", what], on_interrupt="type it again")
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() == line


REFUSED = [
    (Options, "--samples ten", "--samples takes INT, not 'ten'"),
    (Options, "--radii 0.5 b", "--radii takes [NUMBER [NUMBER ...]], not '0.5 b'"),
    (Options, f"--samples {'x' * 90}", f"--samples takes INT, not '{'x' * 90}'"),
    (Options, "--sampels 3", "--sampels, 3; perhaps you meant --samples"),
    (Options, "--no-shufle", "--no-shufle; perhaps you meant --shuffle"),
    (Options, "--else", "unrecognized options: --else"),
    (Options, "--samples", "missing value for argument '--samples'"),
    (Options, "--law x", "invalid choice 'x' for argument '--law'. Expected one of ('gaussian', "),
    (Needing, "", "missing: FILE, --model STR"),
    (tyro.extras.subcommand_type_from_defaults({"a": Options(), "b": Options()}), "", "of {a, b}"),
    (tyro.extras.subcommand_type_from_defaults({"a": Options(), "b": Options()}), "c", "a, b"),
]


@pytest.mark.parametrize("terminal", [{}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1"}])
@pytest.mark.parametrize(("config", "words", "line"), REFUSED, ids=[row[1] for row in REFUSED])
def test_refused_options_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: dict[str, str],
    config: type,
    words: str,
    line: str,
) -> None:
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.run(command, config, "x", "A test.", words.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ") and line in said[0]
    assert said[0].endswith("; see x --help")
    assert os.environ.get("COLUMNS") == terminal.get("COLUMNS")


def test_help_is_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as ended:
        cli.run(command, Options, "x", "A test.", ["--help"])
    assert ended.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) == 70


@pytest.mark.parametrize(
    ("words", "code"), [("x >&-", 2), ("x >&- 2>&-", 2), ("--help >&-", 0), ("--help | true", 0)]
)
def test_output_that_nobody_reads(words: str, code: int) -> None:
    doctor = f'"{sys.executable}" -m nimfast.doctor'
    ended = subprocess.run(f"{doctor} {words}", shell=True, capture_output=True, text=True)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr and "unexpected" not in ended.stderr


def test_fractions_are_options() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(command, Options, "x", "A test.", ["--what", "radii", "--radii", "0", "1/4", "0.5"])
    assert ended.value.code == 0


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(command, Options, "x", "A test.", ["--what", "bug", "--debug"])
    assert "Traceback" in capsys.readouterr().err


# Stands for a thread that the teardown of the interpreter would abort.
LEAVING = """
import atexit, os
from nimfast import cli
atexit.register(os.abort)
print("all", end="")
cli.leave(3)
"""


@pytest.mark.parametrize(("torchrun", "code"), [(True, 3), (False, -signal.SIGABRT)])
def test_processes_of_torchrun_skip_the_teardown(torchrun: bool, code: int) -> None:
    environment = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    if torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "x"
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code
    if torchrun:  # what an interpreter that is torn down has written by then is its own affair
        assert ended.stdout == "all"
