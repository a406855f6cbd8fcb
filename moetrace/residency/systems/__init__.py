"""Runtimes that read which experts to keep, a file each; a new one is a file beside these and a line in `RUNTIMES`."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import SettingError
from moetrace.files import write_bytes
from moetrace.residency.systems.base import ResidentSets
from moetrace.residency.systems.esft import ESFT
from moetrace.residency.systems.exllamav3 import EXLLAMAV3
from moetrace.residency.systems.ktransformers import KTRANSFORMERS
from moetrace.residency.systems.lists import CSV, JSON
from moetrace.residency.systems.llama_cpp import LLAMA_CPP

# In this order files are written.
RUNTIMES = (JSON, CSV, EXLLAMAV3, KTRANSFORMERS, LLAMA_CPP, ESFT)


def write_sets(sets: ResidentSets, stem: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Write *sets* beside *stem* for every runtime.

    Returns for each the ``path`` of its file, its name as ``system`` and the ``flags`` it needs; and a sentence for
    each file that cannot be written.
    """
    written, failed = [], []
    for runtime in RUNTIMES:
        try:
            path = str(write_bytes(stem.with_name(stem.name + runtime.ending), runtime.content(sets)))
        except SettingError as error:
            failed.append(f"no file for {runtime.name}: {error}")
            continue
        written.append({"path": path, "system": runtime.name, "flags": runtime.flags(sets, path)})
    return written, failed
