"""What a shell completes: the names of traces, predictors, formats and findings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import typer

from moetrace.errors import MoetraceError
from moetrace.words import DEFAULT_WORKSPACE, WORKSPACE


def trace_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The traces of the workspace of this command; none where it cannot be listed."""
    from moetrace.workspace.traces import Workspace

    root = ctx.params.get("workspace") or os.environ.get(WORKSPACE) or DEFAULT_WORKSPACE
    with suppress(MoetraceError, OSError):
        return _beginning(Workspace(Path(root)).names(), incomplete)
    return []


def predictor_names(incomplete: str) -> list[str]:
    """Our predictors, and those of installed packages."""
    from moetrace.forecasting.predictors import GROUP, PREDICTORS
    from moetrace.settings import installed

    return _beginning([*PREDICTORS, *installed(GROUP)], incomplete)


def format_names(incomplete: str) -> list[str]:
    """The formats that `ingest` reads, and those of installed packages."""
    from moetrace.formats.readers import names

    return _beginning(names(), incomplete)


def finding_names(incomplete: str) -> list[str]:
    """The findings of the doctor."""
    from moetrace.doctor import KINDS

    return _beginning(KINDS, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
