"""Serving systems, a file each: what each writes, reads, is started with, does by default, and is called.

A new one is a file beside these and a line in `SYSTEMS`. Plan files are written for every system that reads one, and
the plan deployed today is read from its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moetrace.errors import SettingError, TraceError
from moetrace.files import write_bytes
from moetrace.placement.plan import Plan
from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy
from moetrace.placement.systems.base import File, System, renumbered
from moetrace.placement.systems.eplb import EPLB
from moetrace.placement.systems.own import BY_STATE, MOETRACE, NONE, STATIC
from moetrace.placement.systems.sglang import SGLANG
from moetrace.placement.systems.tensorrt_llm import TENSORRT_LLM
from moetrace.placement.systems.vllm import VLLM
from moetrace.placement.systems.vllm_ascend import MINDIE, VLLM_ASCEND
from moetrace.settings import unknown

T = TypeVar("T")

FORMS = "SGLang's physical_to_logical_map, vllm-ascend's layer_list, TensorRT-LLM's YAML, or EPLB's phy2log as .npy"
# In this order policies are replayed and files written.
SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (NONE, STATIC, VLLM, SGLANG, VLLM_ASCEND, MINDIE, TENSORRT_LLM, EPLB, MOETRACE, BY_STATE)
}


def systems_named(names: Sequence[str]) -> list[System]:
    """The systems with these *names*, in any case; all systems without names.

    Raises `SettingError` for another name.
    """
    known = {name.lower(): system for name, system in SYSTEMS.items() if system.files or system.launch}
    for name in names:
        if name.lower() not in known:
            raise unknown("system", name, known)
    return [known[name.lower()] for name in names] or list(SYSTEMS.values())


def policies(layers: int, systems: Sequence[str] = ()) -> list[Policy]:
    """The policies that are replayed on a trace of so many *layers*, those of each system together.

    With *systems* those of the systems so named, and of no system.
    """
    own = (NONE.name, STATIC.name, MOETRACE.name, BY_STATE.name)
    able = [system for name, system in SYSTEMS.items() if not systems or name in (*systems, *own)]
    return [policy for system in able for policy in system.policies(layers)]


def launch(policy: Policy, planning: Planning, experts: int) -> str:
    """How the system of *policy* is started so that it plans by itself; empty where the plan comes from a file."""
    start = SYSTEMS[policy.system].launch
    return "" if start is None else start(policy, planning, experts)


def write_files(
    plan: T, stem: Path, files: Iterable[File[T]], what: str = "plan"
) -> tuple[list[dict[str, str]], list[str]]:
    """Write *plan* beside *stem* as each of *files*.

    Returns for each its ``path``, its name as ``system``, and the ``flags`` it needs; and a sentence for each that
    cannot be written, about the *what* that is missing. Of two files with one ending the first is that of both.
    """
    written, failed, paths = list[dict[str, str]](), list[str](), dict[str, str]()
    for file in files:
        try:
            if file.ending not in paths:
                paths[file.ending] = str(write_bytes(stem.with_name(stem.name + file.ending), file.content(plan)))
        except SettingError as error:
            failed.append(f"no {what} for {file.name}: {error}")
        else:
            path = paths[file.ending]
            written.append({"path": path, "system": file.name, "flags": file.flags(plan, path)})
    return written, failed


def read_plan(
    path: Path, layers: Sequence[int], experts: int, gpus: int, first_layer: int | None = None
) -> dict[int, Plan]:
    """The plan of each of *layers* in the file at *path*: for *experts*, counted from 0, on *gpus*.

    SGLang and TensorRT-LLM number the layers as the model does, where the first of *layers* is *first_layer*, its own
    number if None; the rows of the others are the MoE layers in order.
    Raises `TraceError` for an unknown kind of file, and if it lacks a layer or an expert, or does not fill the GPUs.
    """
    names = renumbered(layers, first_layer)
    found = _slots_in(path, gpus)
    if not isinstance(found, Mapping):  # rows of MoE layers, or of every layer where there are more
        found = dict(zip(sorted(names.values()) if len(found) == len(layers) else range(len(found)), found))
    plans = {}
    for layer, name in names.items():
        if name not in found:
            raise TraceError(str(path), f"layer {name} is missing", "give the plan of every layer of the trace")
        plans[layer] = _checked(path, f"layer {name}", found[name], experts, gpus)
    if len({int(plan.held.sum()) for plan in plans.values()}) > 1:
        raise TraceError(str(path), "layers have different numbers of slots", "give as many to each")
    return plans


def _checked(path: Path, where: str, row: Any, experts: int, gpus: int) -> Plan:
    """The plan of the layer *where*, whose slots the file has as *row*."""
    ragged = isinstance(row, list) and not all(isinstance(expert, int) for expert in row)
    slots = np.empty(0, np.int64) if ragged else np.asarray(row)
    if slots.ndim != 1 or not len(slots) or not np.issubdtype(slots.dtype, np.integer):
        raise TraceError(str(path), f"{where}: the slots are not a list of whole numbers", f"give {FORMS}")
    if len(slots) % gpus:
        raise TraceError(str(path), f"{where}: {len(slots)} slots do not fill {gpus} GPUs evenly", "see --gpus")
    strange = np.setxor1d(slots, np.arange(experts))
    if len(strange):
        missing = "is in no slot" if strange[0] in range(experts) else f"is none of the {experts} experts"
        raise TraceError(str(path), f"{where}: expert {strange[0]} {missing}", "is it the plan of this model?")
    return Plan.of(slots.reshape(gpus, -1), experts)


def _slots_in(path: Path, gpus: int) -> Mapping[int, Any] | Sequence[Any]:
    """The slots of each layer, GPU after GPU: by its number, or in order."""
    import yaml

    try:
        if path.suffix == ".npy":
            return list(np.load(path, allow_pickle=False))
        text = path.read_text("utf-8")
        document = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
        for system in SYSTEMS.values():
            if system.read is not None and isinstance(document, dict):
                try:
                    return system.read(document, gpus)
                except KeyError:
                    continue
        problem = "is not a plan of a known system"
    except OSError as error:
        problem = error.strerror or "cannot be read"
    except (ValueError, TypeError, EOFError, AttributeError, RecursionError, yaml.YAMLError) as error:
        problem = str(error) if "GPUs" in str(error) else "is not a plan of a known system"
    raise TraceError(str(path), problem, f"give {FORMS}")
