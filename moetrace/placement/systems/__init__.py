"""Serving systems, a file each: what each writes, reads, is started with, does by default, and is called.

A new one is a file beside these and a line in `SYSTEMS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy
from moetrace.placement.systems.base import System
from moetrace.placement.systems.eplb import EPLB
from moetrace.placement.systems.own import BY_STATE, MOETRACE, NONE, STATIC
from moetrace.placement.systems.sglang import SGLANG
from moetrace.placement.systems.tensorrt_llm import TENSORRT_LLM
from moetrace.placement.systems.vllm import VLLM
from moetrace.placement.systems.vllm_ascend import MINDIE, VLLM_ASCEND
from moetrace.settings import unknown

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
