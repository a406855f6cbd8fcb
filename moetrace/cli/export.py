"""`moetrace export`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from moetrace.cli.options import Shared
from moetrace.cli.output import while_read
from moetrace.words import EXPORTED


class Kind(StrEnum):
    """The layout of an exported trace."""

    LONG = "long"
    WIDE = "wide"
    NESTED = "nested"
    CSV = "csv"
    NPZ = "npz"
    FORECASTING = "forecasting"


class Exported(Shared):
    """The shared options; a layout may have any ending."""

    endings = None


def export(
    shared: Exported,
    trace: Annotated[str, typer.Argument(help="Name or path of a trace.")],
    to: Annotated[
        Kind | None, typer.Option("--to", help="Layout  [default: from the extension of -o, otherwise long]")
    ] = None,
) -> None:
    """Export a trace to another format.

    Layouts in Parquet: long has step, layer, expert, tokens; wide has step, layer, expert_0, ...;
    nested has step, layer, counts. The layout forecasting has the columns unique_id, ds and y: one
    sorted series for each expert. csv is the layout long as a CSV file. npz contains NumPy arrays.

    \b
    Example: moetrace export gpt-moe-8e-a --to long -o a.parquet
    """
    from moetrace.files import output, temporary
    from moetrace.formats.export import export_trace

    if shared.output is None:
        raise typer.BadParameter("missing -o PATH: the file to write, or -o - for the standard output")
    layout = str(to or EXPORTED.get(shared.output.suffix.lower(), Kind.LONG))
    opened = shared.open(trace)
    if str(shared.output) == "-":
        with temporary() as held:
            export_trace(opened, held, layout)
            with held.open("rb") as content, while_read():
                shutil.copyfileobj(content, sys.stdout.buffer)
        return
    with output(shared.output, force=shared.force) as held:
        export_trace(opened, held, layout)
    document = {"trace": opened.name, "to": layout, "path": str(shared.output)}
    replace(shared, output=None).emit({}, document, wrote=[str(shared.output)])
