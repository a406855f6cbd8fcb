"""Runtimes that read which experts to keep, a file each; a new one is a file beside these and a line in `RUNTIMES`."""

from __future__ import annotations

from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets
from moetrace.residency.systems.esft import ESFT
from moetrace.residency.systems.exllamav3 import EXLLAMAV3
from moetrace.residency.systems.ktransformers import KTRANSFORMERS
from moetrace.residency.systems.lists import CSV, JSON
from moetrace.residency.systems.llama_cpp import LLAMA_CPP

# In this order files are written.
RUNTIMES: tuple[File[ResidentSets], ...] = (JSON, CSV, EXLLAMAV3, KTRANSFORMERS, LLAMA_CPP, ESFT)
