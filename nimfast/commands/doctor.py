# SPDX-License-Identifier: Apache-2.0
"""What is installed, and which back end serves which device: the work of `nimfast.doctor`."""

from __future__ import annotations

import os
import warnings

import torch
from rich.table import Table

from nimfast import cli, ops, runtime
from nimfast.ops import backend


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch sees."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def native_state() -> str:
    """What the compiled module holds, or why it cannot be imported."""
    module = backend.native()
    if module is None:
        return f"missing: {backend.why_not('native', 'corrupt', torch.device('cpu'))}"
    cuda = module.cuda_architectures or "none (built without CUDA)"
    return f"_nimfast {module.version}, CPU level {module.cpu_level()}, CUDA architectures: {cuda}"


def doctor() -> None:
    """Print the report."""
    facts = Table(title="nimfast", title_justify="left", show_header=False)
    for name, version in runtime.versions().items():
        facts.add_row(name, version)
    facts.add_row("compiled kernels", native_state())
    facts.add_row("torch's CUDA", torch.version.cuda or "none")
    if os.environ.get("NIMFAST_BACKEND"):
        facts.add_row("NIMFAST_BACKEND", os.environ["NIMFAST_BACKEND"])
    cli.console.print(facts)

    table = Table(title="back ends", title_justify="left")
    for column in ("device", "back end", "state"):
        table.add_column(column, overflow="fold")
    for device in devices():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says it
            chosen = {op: backend.choose(op, device) for op in ops.OPERATIONS}
        name = f"{device}\n{runtime.describe(device)}"
        for candidate in backend.BACKENDS:
            served = [op for op in ops.OPERATIONS if chosen[op] == candidate]
            state = f"[bold green]serves {', '.join(served)}[/]" if served else ""
            # What it does not serve and why: one line for each reason.
            problems = {op: backend.why_not(candidate, op, device) for op in ops.OPERATIONS}
            for problem in dict.fromkeys(filter(None, problems.values())):
                names = [op for op in ops.OPERATIONS if problems[op] == problem]
                which = "" if len(names) == len(ops.OPERATIONS) else f"{', '.join(names)}: "
                state += f"{chr(10) if state else ''}{which}{problem}"
            table.add_row(name, candidate, state or "available")
            name = ""
        table.add_section()
    cli.console.print(table)
    if backend.native() is None:
        cli.console.print(
            "Install a C++17 compiler and run: pip install --force-reinstall --no-deps ."
        )
