"""The plan that a system runs today, read from its file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import TraceError
from moetrace.placement.expert_maps import renumbered
from moetrace.placement.packing import Ints
from moetrace.placement.plan import Plan

FORMS = "SGLang's physical_to_logical_map, vllm-ascend's layer_list, TensorRT-LLM's YAML, or EPLB's phy2log as .npy"
ROW = re.compile(r"(\d+)\s*:\s*(?:\[([\d,\s]*)\]|((?:\s*-\s*\d+)+))")


def running_plan(
    path: Path, layers: Sequence[int], experts: int, gpus: int, first_layer: int | None = None
) -> dict[int, Plan]:
    """The plan of each of *layers* in the file at *path*: for *experts*, counted from 0, on *gpus*.

    SGLang and TensorRT-LLM number the layers as the model does, where the first of *layers* is *first_layer*, its own
    number if None; the rows of the others are the MoE layers in order.
    Raises `TraceError` where the file is none of these, misses a layer or an expert, or does not fill the GPUs.
    """
    names = renumbered(layers, first_layer)
    rows = _rows(path, [*names.values()], gpus)
    plans = {}
    for layer, name in names.items():
        if name not in rows:
            raise TraceError(str(path), f"layer {name} is missing", "give the plan of every layer of the trace")
        plans[layer] = _plan(path, name, rows[name], experts, gpus)
    if len({int(plan.held.sum()) for plan in plans.values()}) > 1:
        raise TraceError(str(path), "layers have different numbers of slots", "give as many to each")
    return plans


def _plan(path: Path, layer: int, row: Any, experts: int, gpus: int) -> Plan:
    ragged = isinstance(row, list) and not all(isinstance(expert, int) for expert in row)
    slots: Ints = np.empty(0, np.int64) if ragged else np.asarray(row)
    if slots.ndim != 1 or not len(slots) or not np.issubdtype(slots.dtype, np.integer):
        raise TraceError(str(path), f"layer {layer}: the slots are no list of whole numbers", f"give {FORMS}")
    if len(slots) % gpus:
        raise TraceError(str(path), f"layer {layer}: {len(slots)} slots do not fill {gpus} GPUs evenly", "see --gpus")
    strange = np.setxor1d(slots, np.arange(experts))
    if len(strange):
        missing = "is in no slot" if strange[0] in range(experts) else f"is none of the {experts} experts"
        raise TraceError(str(path), f"layer {layer}: expert {strange[0]} {missing}", "is it the plan of this model?")
    return Plan.of(slots.reshape(gpus, -1), experts)


def _rows(path: Path, layers: Sequence[int], gpus: int) -> Mapping[int, Any]:
    """The slots of each layer by its number, GPU after GPU."""
    try:
        if path.suffix == ".npy":
            return _numbered(np.load(path, allow_pickle=False), layers)
        text = path.read_text("utf-8")
        if path.suffix in {".yaml", ".yml"}:
            return _of_yaml(text)
        document = json.loads(text)
        if "physical_to_logical_map" in document:
            return dict(enumerate(document["physical_to_logical_map"]))
        return _numbered([_of_devices(layer, path, gpus) for layer in document["layer_list"]], layers)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is not a plan that is known"
        raise TraceError(str(path), str(reason), f"give {FORMS}") from None


def _of_devices(layer: Mapping[str, Any], path: Path, gpus: int) -> list[int]:
    devices = sorted(layer["device_list"], key=lambda device: device["device_id"])
    if len(devices) != gpus:
        raise TraceError(str(path), f"is a plan of {len(devices)} GPUs, not of {gpus}", "see --gpus")
    return [expert for device in devices for expert in device["device_expert"]]


def _of_yaml(text: str) -> dict[int, list[int]]:
    found = ROW.findall(text.partition("initial_global_assignments")[2])
    return {int(layer): [int(n) for n in re.findall(r"\d+", row or block)] for layer, row, block in found}


def _numbered(rows: Sequence[Any] | Ints, layers: Sequence[int]) -> dict[int, Any]:
    """Rows of MoE layers by the number of the layer; of every layer, if there are as many as the model has."""
    if len(rows) == len(layers):
        return dict(zip(sorted(layers), rows))
    return dict(enumerate(rows))
