"""vLLM 0.33: plans by itself with EPLB's rule (window 1,000, every 3,000 steps by default); it reads no plan file."""

import json
from itertools import product

from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy, plan_as_eplb
from moetrace.placement.systems.base import System

# Its default first.
GRID = ((1000, 3000), *product((1000, 250), (1000, 250)))


def _launch(policy: Policy, planning: Planning, _experts: int) -> str:
    settings = {"window_size": policy.window, "step_interval": policy.interval}
    settings |= {"num_redundant_experts": planning.redundant}
    return f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(settings)}'"


VLLM = System(
    "vLLM",
    policies=lambda _: [Policy("vLLM", window, every, plan_as_eplb, even=True) for window, every in GRID],
    launch=_launch,
)
