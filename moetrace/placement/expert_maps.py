"""Plans as serving systems read them: which expert is in which slot of which GPU, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moetrace.errors import SettingError

# Layers of a model; beyond that their numbers are something else.
MOST_LAYERS = 10_000

Slots = Mapping[int, Sequence[Sequence[int]]]
"""For each layer, by its number in the model, the experts in the slots of each GPU."""


def ascend(slots: Slots) -> str:
    """The expert map of vllm-ascend (``expert_map_path``) and MindIE; MoE layers are counted from 0 there."""
    layers = [
        {
            "layer_id": i,
            "device_count": len(gpus),
            "device_list": [{"device_id": gpu, "device_expert": list(own)} for gpu, own in enumerate(gpus)],
        }
        for i, gpus in enumerate(slots[layer] for layer in sorted(slots))
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}, indent=1)


def sglang(slots: Slots) -> str:
    """What ``--init-expert-location`` of SGLang reads: a row for every layer from 0, the slots GPU after GPU.

    A layer that is not among *slots*, such as a dense one, gets the experts in their order.
    Raises `SettingError` where layers have numbers that no model has.
    """
    if max(slots) > MOST_LAYERS:
        raise SettingError(f"a row for every layer up to {max(slots):,} is needed: number layers as the model does")
    flat = {layer: [expert for own in gpus for expert in own] for layer, gpus in slots.items()}
    some = next(iter(flat.values()))
    experts = max(some) + 1
    in_order = [slot % experts for slot in range(len(some))]
    rows = [flat.get(layer, in_order) for layer in range(max(flat) + 1)]
    return json.dumps({"physical_to_logical_map": rows})


def tensorrt_llm(slots: Slots) -> str:
    """The ``moe_config.load_balancer`` of TensorRT-LLM, as YAML: an assignment that stays as it is."""
    flat = {layer: [expert for own in slots[layer] for expert in own] for layer in sorted(slots)}
    lines = [f"num_slots: {len(next(iter(flat.values())))}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    return "\n".join([*lines, *(f"  {layer}: {row}" for layer, row in flat.items())]) + "\n"


class Map(NamedTuple):
    """How the plan of a model is written for the systems that *readers* names; *ending* is that of the file."""

    readers: str
    ending: str
    text: Callable[[Slots], str]


MAPS = (
    Map("vllm-ascend and MindIE", ".ascend.json", ascend),
    Map("SGLang", ".sglang.json", sglang),
    Map("TensorRT-LLM", ".tensorrt-llm.yaml", tensorrt_llm),
)
