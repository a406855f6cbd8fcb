"""Plans as serving systems read them: which expert is in which slot of which GPU, layer by layer, and the flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moetrace.errors import SettingError

# Layers of a model; beyond that their numbers are something else.
MOST_LAYERS = 10_000

Slots = Mapping[int, Sequence[Sequence[int]]]
"""For each layer, by its number in the model, the experts in the slots of each GPU."""


def ascend(slots: Slots, model_layers: int = 0) -> str:  # noqa: ARG001 - it knows no other layers
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


def sglang(slots: Slots, model_layers: int = 0) -> str:
    """What ``--init-expert-location`` of SGLang reads: a row for every layer from 0, the slots GPU after GPU.

    A layer that is not among *slots*, such as a dense one, or one after them up to *model_layers*, gets the experts in
    their order. Raises `SettingError` where layers have numbers that no model has.
    """
    return json.dumps({"physical_to_logical_map": [*_every_layer(slots, 0, model_layers).values()]})


def sglang_counts(slots: Slots, model_layers: int = 0) -> str:
    """How many replicas each expert has, which ``--init-expert-location`` reads too; SGLang places them itself."""
    rows = _every_layer(slots, 0, model_layers).values()
    return json.dumps({"logical_count": [[row.count(expert) for expert in range(max(row) + 1)] for row in rows]})


def tensorrt_llm(slots: Slots, model_layers: int = 0) -> str:
    """The ``moe_config.load_balancer`` of TensorRT-LLM, as YAML: an assignment that stays as it is.

    Layers that are missing between the first and *model_layers* get the experts in their order: it stops where it
    finds none.
    """
    flat = _every_layer(slots, min(slots), model_layers) if model_layers else _flat(slots)
    lines = [f"num_slots: {_number_of(slots)}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    return "\n".join([*lines, *(f"  {layer}: {row}" for layer, row in sorted(flat.items()))]) + "\n"


def _flat(slots: Slots) -> dict[int, list[int]]:
    return {layer: [expert for own in gpus for expert in own] for layer, gpus in slots.items()}


def _number_of(slots: Slots) -> int:
    return sum(map(len, next(iter(slots.values()))))


def _every_layer(slots: Slots, first: int, model_layers: int) -> dict[int, list[int]]:
    """The slots of every layer from *first* to the last there is, in order where there is no plan."""
    if max(slots) > MOST_LAYERS:
        raise SettingError(f"a row for every layer up to {max(slots):,} is needed: number layers as the model does")
    flat = _flat(slots)
    some = next(iter(flat.values()))
    in_order = [slot % (max(some) + 1) for slot in range(len(some))]
    if 0 < model_layers <= max(flat):
        raise SettingError(
            f"layer {max(flat)} is none of {model_layers} layers that count from 0: a trace that counts them from 1 "
            "makes a file that is one layer late"
        )
    return {layer: flat.get(layer, in_order) for layer in range(first, max(max(flat) + 1, model_layers))}


def _redundant(slots: Slots) -> int:
    return _number_of(slots) - len({expert for own in next(iter(slots.values())) for expert in own})


def _sglang_flags(slots: Slots, path: str) -> str:
    gpus = len(next(iter(slots.values())))
    return f"--init-expert-location {path} --ep-size {gpus} --ep-num-redundant-experts {_redundant(slots)}"


def _ascend_flags(slots: Slots, path: str) -> str:
    settings = {"expert_map_path": path} | ({"num_redundant_experts": _redundant(slots)} if _redundant(slots) else {})
    return f"--enable-expert-parallel --additional-config '{json.dumps({'eplb_config': settings})}'"


def _tensorrt_llm_flags(slots: Slots, path: str) -> str:
    gpus = len(next(iter(slots.values())))
    return (
        f"moe_config: {{backend: WIDEEP, load_balancer: {path}}}, enable_attention_dp: true, "
        f"moe_expert_parallel_size: {gpus}"
    )


class Map(NamedTuple):
    """How the plan of a model is written for the systems that *readers* names; *ending* is that of the file.

    *flags* are what the system must be started with, for the slots and the path of the file.
    """

    readers: str
    ending: str
    text: Callable[..., str]
    flags: Callable[[Slots, str], str]


MAPS = (
    Map("vllm-ascend and MindIE", ".ascend.json", ascend, _ascend_flags),
    Map("SGLang", ".sglang.json", sglang, _sglang_flags),
    Map("SGLang, replicas alone", ".sglang-counts.json", sglang_counts, _sglang_flags),
    Map("TensorRT-LLM", ".tensorrt-llm.yaml", tensorrt_llm, _tensorrt_llm_flags),
)
