# SPDX-License-Identifier: Apache-2.0
"""What every command line shares: exit codes, one line for an error, one for a warning."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from nimfast import cli
from nimfast.errors import UserError


@dataclass
class Options:
    """A command of the tests."""

    what: str = "nothing"


def command(options: Options) -> None:
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
