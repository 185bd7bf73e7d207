# SPDX-License-Identifier: Apache-2.0
"""Shared shell of every command line: parse a dataclass, run, and report errors in one line.

Exit codes: 0 done, 2 bad input, 130 interrupted, 1 a bug of ours (or nobody reads the output).
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.markup import escape

from nimfast.errors import UserError
from nimfast.parsing import parse

Config = TypeVar("Config")

console = Console()
_stderr = Console(stderr=True, soft_wrap=True)


def run(
    main: Callable[[Config], None],
    config: type[Config],
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
    on_interrupt: str = "nothing was kept",
) -> NoReturn:
    """Parse `args` (default: the command line) into `config`, call `main` with it, and exit.

    Args:
        main: the command; raises `UserError` for anything the user can mend.
        config: dataclass (or union of dataclasses) whose documented fields are the options.
        prog: how the command is typed, for example ``python -m nimfast.certify``.
        description: shown by ``--help``.
        args: the arguments, without the program name.
        on_interrupt: what Ctrl-C left behind, and what to do.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until we end)
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        settings = parse(config, prog, f"{description} (--debug: tracebacks)", words)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            main(settings)
    except UserError as error:
        fail(str(error), code=2, debug=debug)
    except KeyboardInterrupt:
        fail(f"interrupted; {on_interrupt}", code=130, debug=debug)
    except BrokenPipeError:  # whoever read the output has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except Exception as error:  # a bug of ours
        fail(
            f"unexpected {type(error).__name__}: {error} (run again with --debug)",
            code=1,
            debug=debug,
        )
    leave(0)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    line = " ".join(str(message).split())  # where in the code it arose says nothing to a user
    _stderr.print(f"[yellow]warning:[/] {escape(line)}", highlight=False)


def fail(message: str, code: int, debug: bool) -> NoReturn:
    """Print `message` as one line on stderr, with the traceback before it when debugging."""
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    _stderr.print(f"[bold red]error:[/] {escape(line)}", highlight=False)
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process; one of torchrun's without tearing down the interpreter.

    Threads of a gloo group outlive it where weights are shared (torch's caches hold the group). One
    that still has a tensor to let go then meets an interpreter without threads, and before Python
    3.14 that aborts the whole run. Commands have closed all they write when they come here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
