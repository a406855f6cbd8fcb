"""Plans as serving systems read them: which expert is in which slot of which GPU, layer by layer, and the flags."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import NamedTuple

import numpy as np

from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVEN, LP, NEAREST

# Layers of a model; beyond that their numbers are something else.
MOST_LAYERS = 10_000
# What SGLang calls the ways to split tokens; if nothing is said, an all-to-all backend takes the nearest replica.
SGLANG_DISPATCH = {EVEN: "dynamic", NEAREST: "static", LP: "lp"}
# Loads are written as whole numbers that add up to about so many tokens a layer.
TOKENS = 1_000_000

Slots = Mapping[int, Sequence[Sequence[int]]]
"""For each layer, by its number in the model, the experts in the slots of each GPU."""


@dataclass(frozen=True)
class Deployed:
    """What is written for a model.

    *slots* are the experts of each GPU, *loads* the predicted share of each expert, both by the number of the layer
    in the model; the model has *model_layers* layers, 0 if that is not known. *dispatch* is how the tokens of an expert
    are split among its replicas, see `Dispatch`; *groups* of experts stay on one of so many *nodes*.
    """

    slots: Slots
    loads: Mapping[int, Sequence[float]] = field(default_factory=dict)
    model_layers: int = 0
    dispatch: str = EVEN
    groups: int = 1
    nodes: int = 1

    def numbered(self, first_layer: int | None) -> Deployed:
        """The same with *first_layer* as the number of its first layer, the others as far from it as they were."""
        names = renumbered(sorted(self.slots), first_layer)
        slots = {names[layer]: own for layer, own in self.slots.items()}
        loads = {names[layer]: own for layer, own in self.loads.items()}
        return replace(self, slots=slots, loads=loads)

    @property
    def gpus(self) -> int:
        """How many share a layer."""
        return len(next(iter(self.slots.values())))

    @property
    def number_of_slots(self) -> int:
        """Of all GPUs together, in one layer."""
        return sum(map(len, next(iter(self.slots.values()))))

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len({expert for own in next(iter(self.slots.values())) for expert in own})

    @property
    def redundant(self) -> int:
        """Slots beyond one for each expert."""
        return self.number_of_slots - self.experts

    @property
    def flat(self) -> dict[int, list[int]]:
        """The experts in all slots of each layer, GPU after GPU."""
        return {layer: [expert for own in gpus for expert in own] for layer, gpus in self.slots.items()}

    def every_layer(self, first: int) -> range:
        """The numbers of all layers from *first* to the last that there is.

        Raises `SettingError` where layers have numbers that no model, or not this one, has.
        """
        last = max(self.slots)
        if last > MOST_LAYERS:
            raise SettingError(f"a row for every layer up to {last:,} is needed: number layers as the model does")
        if 0 < self.model_layers <= last:
            raise SettingError(
                f"layer {last} is none of the {self.model_layers} layers of the model, 0 to {self.model_layers - 1}: "
                "check --model-layers, and give --first-layer where the trace does not count from 0 as the model does"
            )
        return range(first, max(last + 1, self.model_layers))


def renumbered(layers: Sequence[int], first_layer: int | None) -> dict[int, int]:
    """The number in the model of each of *layers*, increasing, of which the first is *first_layer*; None for its own.

    >>> renumbered([1, 2, 4], 0)
    {1: 0, 2: 1, 4: 3}
    """
    apart = 0 if first_layer is None or not layers else first_layer - layers[0]
    return {layer: layer + apart for layer in layers}


def ascend(plan: Deployed) -> bytes:
    """The expert map of vllm-ascend (``expert_map_path``) and MindIE; MoE layers are counted from 0 there."""
    layers = [
        {
            "layer_id": i,
            "device_count": plan.gpus,
            "device_list": [{"device_id": gpu, "device_expert": list(own)} for gpu, own in enumerate(gpus)],
        }
        for i, gpus in enumerate(plan.slots[layer] for layer in sorted(plan.slots))
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}, indent=1).encode()


def sglang(plan: Deployed) -> bytes:
    """What ``--init-expert-location`` of SGLang reads: a row for every layer from 0, the slots GPU after GPU.

    A layer that is not in the plan, such as a dense one, or one after it up to the last of the model, gets the
    experts in their order. Raises `SettingError` where layers have numbers that no model has.
    """
    return json.dumps({"physical_to_logical_map": [*_every_row(plan, 0).values()]}).encode()


def sglang_counts(plan: Deployed) -> bytes:
    """The predicted tokens of each expert, which ``--init-expert-location`` reads too; SGLang plans by them itself.

    A row for every layer as in `sglang`; those that are not in the plan have the same load for each expert.
    """
    even = [1 / plan.experts] * plan.experts
    shares = [plan.loads.get(layer, even) for layer in plan.every_layer(0)]
    return json.dumps({"logical_count": np.rint(np.array(shares) * TOKENS).astype(int).tolist()}).encode()


def tensorrt_llm(plan: Deployed) -> bytes:
    """The ``moe_config.load_balancer`` of TensorRT-LLM, as YAML: an assignment that stays as it is.

    Layers that are missing between the first and the last of the model get the experts in their order: it stops
    where it finds none.
    """
    rows = _every_row(plan, min(plan.slots)) if plan.model_layers else plan.flat
    lines = [f"num_slots: {plan.number_of_slots}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    return ("\n".join([*lines, *(f"  {layer}: {row}" for layer, row in sorted(rows.items()))]) + "\n").encode()


def eplb_weight(plan: Deployed) -> bytes:
    """The ``weight`` of DeepSeek's EPLB: the predicted load, (layers, experts), MoE layers in order, as ``.npy``."""
    file = io.BytesIO()
    np.save(file, np.array([plan.loads[layer] for layer in sorted(plan.loads)]) * TOKENS)
    return file.getvalue()


def _every_row(plan: Deployed, first: int) -> dict[int, list[int]]:
    """The slots of every layer from *first* to the last there is, in order where there is no plan."""
    flat, in_order = plan.flat, (np.arange(plan.number_of_slots) % plan.experts).tolist()
    return {layer: flat.get(layer, in_order) for layer in plan.every_layer(first)}


def sglang_flags(gpus: int, redundant: int, dispatch: str) -> str:
    """How SGLang is told the number of GPUs and of replicas, and how to split tokens where there are any."""
    split = f" --ep-dispatch-algorithm {SGLANG_DISPATCH[dispatch]}" if redundant else ""
    return f"--ep-size {gpus} --ep-num-redundant-experts {redundant}{split}"


def _sglang_flags(plan: Deployed, path: str) -> str:
    return f"--init-expert-location {quote(path)} {sglang_flags(plan.gpus, plan.redundant, plan.dispatch)}"


def _ascend_flags(plan: Deployed, path: str) -> str:
    settings = {"expert_map_path": path} | ({"num_redundant_experts": plan.redundant} if plan.redundant else {})
    return f"--enable-expert-parallel --additional-config {quote(json.dumps({'eplb_config': settings}))}"


def _mindie_flags(_plan: Deployed, path: str) -> str:
    return f'"eplb": {json.dumps({"level": 1, "expert_map_file": path})}'


def _tensorrt_llm_flags(plan: Deployed, path: str) -> str:
    return (
        f"moe_config: {{backend: WIDEEP, load_balancer: {path}}}, enable_attention_dp: true, "
        f"moe_expert_parallel_size: {plan.gpus}"
    )


def _eplb_flags(plan: Deployed, path: str) -> str:
    return (
        f'rebalance_experts(torch.from_numpy(numpy.load("{path}")), num_replicas={plan.number_of_slots}, '
        f"num_groups={plan.groups}, num_nodes={plan.nodes}, num_gpus={plan.gpus})"
    )


class Map(NamedTuple):
    """A file for serving systems: its *content*, its *ending*, and by system what that must be started with.

    The flags are made for the plan and the path of the file.
    """

    ending: str
    content: Callable[[Deployed], bytes]
    flags: Mapping[str, Callable[[Deployed, str], str]]


MAPS = (
    Map(".sglang.json", sglang, {"SGLang": _sglang_flags}),
    Map(".sglang-counts.json", sglang_counts, {"SGLang, planning by itself": _sglang_flags}),
    Map(".ascend.json", ascend, {"vllm-ascend": _ascend_flags, "MindIE": _mindie_flags}),
    Map(".tensorrt-llm.yaml", tensorrt_llm, {"TensorRT-LLM": _tensorrt_llm_flags}),
    Map(".eplb-weight.npy", eplb_weight, {"DeepSeek's EPLB": _eplb_flags}),
)
