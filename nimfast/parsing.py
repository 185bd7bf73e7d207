# SPDX-License-Identifier: Apache-2.0
"""A command's words into its options; what tyro refuses becomes one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

import tyro
from rich.text import Text
from tyro.constructors import PrimitiveConstructorSpec

from nimfast.errors import UserError

Config = TypeVar("Config")

_RULE = re.compile(r"\s*[-─]+\s*")
_MISREAD = re.compile(r"Error parsing .* (?P<value>'[^']*'|\[[^\[\]]*\])\.?")
_NEAR = ("Perhaps you meant", "Arguments similar to")


def number(text: str) -> float:
    """``0.25``, ``1/4`` or ``64/255``.

    Raises:
        ValueError: it is none of these.
    """
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1)
    except ZeroDivisionError:
        raise ValueError(f"{text} divides by zero") from None


Number = Annotated[
    float,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]
"""A float that may be typed as a fraction."""


def parse(config: type[Config], prog: str, description: str, words: Sequence[str]) -> Config:
    """The options that `words` give; ``--help`` is answered, and the process ends.

    Args:
        config: dataclass (or union of dataclasses) whose documented fields are the options.
        prog: how the command is typed.
        description: shown by ``--help``.
        words: the arguments, without the program name.

    Raises:
        UserError: an option that there is not, or one without the value that it takes.
    """
    said = io.StringIO()
    # Help is fitted to the terminal; a refusal is read again, and must not be broken into lines.
    asked = not {"-h", "--help"}.isdisjoint(words)
    try:
        with contextlib.redirect_stderr(said), contextlib.nullcontext() if asked else _wide():
            return tyro.cli(config, prog=prog, description=description, args=words)
    except SystemExit as ended:
        if not ended.code:
            raise
        box = Text.from_ansi(said.getvalue()).plain
        raise UserError(f"{refusal(box, words)}; see {prog} --help") from None


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """A terminal as wide as any message."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def refusal(box: str, words: Sequence[str]) -> str:
    """One line that says what tyro's box says: what was wrong, and the nearest options.

    Args:
        box: title, message, then (behind rules) what else helps, in or without a frame.
        words: what was typed.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first is the title, in the frame or above a rule
        row = line.strip("│╭╮╰╯").rstrip()
        if _RULE.fullmatch(row):
            sections.append([])
        elif row:
            sections[-1].append(row)
    sections = [section for section in sections if section]
    if not sections:  # no box
        return " ".join(box.split()) or "the options are not understood"
    told, near = "", []
    for heading, *rows in sections[1:]:
        if heading.lstrip().startswith(_NEAR):
            near += [item.split()[0].strip(",") for item in _items(rows)]
        elif heading.lstrip().startswith("Available"):
            told = f"; {heading.strip().lower()}"
    # What was typed all the same stands in the wrong place.
    if names := dict.fromkeys(name for name in near if name not in words):
        told += f"; perhaps you meant {' or '.join(names)}"
    return _message(*sections) + told


def _message(first: Sequence[str], *others: Sequence[str]) -> str:
    """What was wrong."""
    if first[0].lstrip().startswith("Missing from"):
        return f"missing: {', '.join(_items(first[1:]))}"
    usage = [_items(rows)[0] for heading, *rows in others if "Argument helptext" in heading]
    if usage and (misread := _MISREAD.fullmatch(first[0].strip())):
        option, _, takes = usage[0].partition(" ")
        takes = takes.removeprefix("{None}|").strip("{}")
        value = re.sub(r"[\[\]',]", "", misread["value"])
        return f"{option} takes {takes}, not {value!r}"
    text = " ".join(row.strip() for row in first).partition("Arguments are applied")[0]
    text = re.sub(r" \(applied to .*?\)", "", text).strip(" .")
    return text[:1].lower() + text[1:]


def _items(rows: Sequence[str]) -> list[str]:
    """Those of `rows` that name an option; what explains one is indented further."""
    indents = [len(row) - len(row.lstrip()) for row in rows]
    return [row.strip() for row, by in zip(rows, indents, strict=True) if by == min(indents)]
