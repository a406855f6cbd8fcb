"""SGLang 0.5.23: plans by itself with EPLB's rule every 1,000 iterations, or starts from a file of slots or loads."""

import json
from shlex import quote

import numpy as np

from moetrace.placement.dispatch import EVEN, LP, NEAREST
from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy, plan_as_eplb
from moetrace.placement.systems.base import TOKENS, Deployment, File, System

# What SGLang calls the ways to split tokens that it has; by default an all-to-all backend takes the nearest replica.
DISPATCH = {EVEN: "dynamic", NEAREST: "static", LP: "lp"}


def _launch(policy: Policy, planning: Planning, _experts: int) -> str:
    flags = (
        f"--enable-eplb --eplb-rebalance-num-iterations {policy.interval} "
        f"{sizes(planning.gpus, planning.redundant, planning.dispatch)}"
    )
    if policy.threshold is None:
        return flags
    # Utilisation is only measured where it is reported.
    gate = f"--eplb-min-rebalancing-utilization-threshold {policy.threshold}"
    return f"{flags} {gate} --expert-balancedness-report-mode server_log"


def sizes(gpus: int, redundant: int, dispatch: str) -> str:
    """The flags for the number of GPUs and of redundant experts, and for how tokens are split among replicas."""
    split = f" --ep-dispatch-algorithm {DISPATCH[dispatch]}" if redundant and dispatch in DISPATCH else ""
    return f"--ep-size {gpus} --ep-num-redundant-experts {redundant}{split}"


def _flags(plan: Deployment, path: str) -> str:
    return f"--init-expert-location {quote(path)} {sizes(plan.gpus, plan.redundant, plan.dispatch)}"


def slots(plan: Deployment) -> bytes:
    """What ``--init-expert-location`` reads: a row for every layer from 0, the slots GPU after GPU.

    A layer that is not in the plan, such as a dense one, or one after it up to the last of the model, gets the
    default placement. Raises `SettingError` for numbers of layers that no model has.
    """
    return json.dumps({"physical_to_logical_map": [*plan.every_row(0).values()]}).encode()


def loads(plan: Deployment) -> bytes:
    """The predicted tokens of each expert, which ``--init-expert-location`` reads too; SGLang plans from them itself.

    A row for every layer as in `slots`; those that are not in the plan have the same load for each expert.
    """
    even = [1 / plan.experts] * plan.experts
    shares = [plan.loads.get(layer, even) for layer in plan.every_layer(0)]
    return json.dumps({"logical_count": np.rint(np.array(shares) * TOKENS).astype(int).tolist()}).encode()


SGLANG = System(
    "SGLang",
    policies=lambda _: [
        *(Policy("SGLang", every, every, plan_as_eplb) for every in (1000, 250, 3000)),
        Policy("SGLang", 1000, 1000, plan_as_eplb, threshold=0.9),
    ],
    launch=_launch,
    files=(
        File("SGLang", ".sglang.json", slots, _flags),
        File("SGLang, planning by itself", ".sglang-counts.json", loads, _flags),
    ),
    read=lambda document, _gpus: dict(enumerate(document["physical_to_logical_map"])),
)
