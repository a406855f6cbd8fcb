"""vllm-ascend and MindIE read one kind of expert map; vllm-ascend also plans by itself."""

import json
from collections.abc import Sequence
from shlex import quote
from typing import Any

from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy, replan_above_min_gain
from moetrace.placement.systems.base import Deployment, File, System

# vllm-ascend collects loads for 600 passes, plans so many passes later, then changes a layer in each pass.
PLANNING_DELAY = 50


def _policies(layers: int) -> list[Policy]:
    late = PLANNING_DELAY + layers
    return [Policy("vllm-ascend", n, n + late, replan_above_min_gain, late, even=True) for n in (600, 200)]


def _launch(policy: Policy, planning: Planning, _experts: int) -> str:
    settings = {"dynamic_eplb": True, "expert_heat_collection_interval": policy.window}
    settings |= {"algorithm_execution_interval": PLANNING_DELAY, "num_redundant_experts": planning.redundant}
    return f"--enable-expert-parallel --additional-config '{json.dumps({'eplb_config': settings})}'"


def expert_map(plan: Deployment) -> bytes:
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


def _flags(plan: Deployment, path: str) -> str:
    settings = {"expert_map_path": path} | ({"num_redundant_experts": plan.redundant} if plan.redundant else {})
    return f"--enable-expert-parallel --additional-config {quote(json.dumps({'eplb_config': settings}))}"


def _mindie_flags(_plan: Deployment, path: str) -> str:
    return f'"eplb": {json.dumps({"level": 1, "expert_map_file": path})}'


def _read(document: Any, gpus: int) -> Sequence[list[int]]:
    rows = []
    for layer in document["layer_list"]:
        devices = sorted(layer["device_list"], key=lambda device: device["device_id"])
        if len(devices) != gpus:
            raise ValueError(f"is a plan of {len(devices)} GPUs, not of {gpus}; see --gpus")
        rows.append([expert for device in devices for expert in device["device_expert"]])
    return rows


VLLM_ASCEND = System(
    "vllm-ascend",
    policies=_policies,
    launch=_launch,
    files=(File("vllm-ascend", ".ascend.json", expert_map, _flags),),
    read=_read,
)
MINDIE = System("MindIE", files=(File("MindIE", ".ascend.json", expert_map, _mindie_flags),))
