"""Planners of serving systems on the problems that `planners.py` sets; runs in the environment of the rivals.

SGLang's is that of its wheel, vLLM's and vllm-ascend's (FlashLB) those of their source packages. Their modules run as
they are; what they ask of a server that has started is answered here. Programs evolved for the same task, with EPLB's
`rebalance_experts` in torch, are those of MOETRACE_EVOLVED: their paths, as in PATH.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import runpy
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

SITE = Path(sysconfig.get_paths()["purelib"])
ROUNDS, LONG = 5, 5.0


def module(name: str, **answers: SimpleNamespace) -> ModuleType | None:
    """The module of that *name*, none of whose packages is imported; None where it is not installed."""
    parts = name.split(".")
    if not SITE.joinpath(*parts).with_suffix(".py").exists() and not SITE.joinpath(*parts, "__init__.py").exists():
        return None
    for n in range(1, len(parts)):
        package = ModuleType(".".join(parts[:n]))
        package.__path__ = [str(SITE.joinpath(*parts[:n]))]
        sys.modules.setdefault(package.__name__, package)
    sys.modules.update({key.replace("__", "."): answer for key, answer in answers.items()})
    return importlib.import_module(name)


def planners() -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """By name, what plans (layers, experts) for so many replicas, groups, nodes and GPUs."""
    if sglang := module("sglang.srt.eplb.eplb_algorithms.deepseek"):
        yield (
            "SGLang",
            lambda weight, replicas, groups, nodes, gpus: sglang.rebalance_experts(
                weight, replicas, groups, nodes, gpus, enable_hierarchical=nodes > 1
            )[0],
        )
    if vllm := module("vllm.distributed.eplb.policy.default"):
        yield "vLLM", vllm.DefaultEplbPolicy.rebalance_experts
    for path in filter(None, os.environ.get("MOETRACE_EVOLVED", "").split(os.pathsep)):
        program = runpy.run_path(path)["rebalance_experts"]
        yield f"evolved {path}", lambda *problem, program=program: program(*problem)[0]


def planned(problem: dict, weight: np.ndarray, planner: Callable[..., torch.Tensor]) -> tuple[np.ndarray, float]:
    """Slots (layers, replicas) and the median of seconds; of one that takes long a single time."""
    load, seconds = torch.from_numpy(weight), []
    while len(seconds) < ROUNDS and sum(seconds) < LONG:
        start = time.perf_counter()
        slots = planner(load, problem["replicas"], problem["groups"], problem["nodes"], problem["gpus"])
        seconds.append(time.perf_counter() - start)
    return np.asarray(slots), float(np.median(seconds))


def flashlb(steps: np.ndarray, problem: dict, samples: int) -> np.ndarray:
    """Slots (gpus, slots) by FlashLB for counts (steps, experts), which it adds up to so many *samples*; -1 if none."""
    answers = {
        "vllm__logger": SimpleNamespace(logger=logging.getLogger()),
        "vllm_ascend__distributed__parallel_state": SimpleNamespace(get_dynamic_eplb_group=None),
    }
    found = module("vllm_ascend.eplb.core.policy.policy_flashlb", **answers)
    own = found.FlashLBConfig
    window = max(len(steps) // samples, 1)
    data = (steps + 1)[-window * samples :].reshape(-1, window, steps.shape[1]).sum(axis=1)
    tree = found.FlashTree(data, problem["replicas"], problem["gpus"], own.z_score, own.depth, own.width)
    return tree.optimize_balanceness()[0]


def main(folder: Path) -> None:
    """Solve the problems in *folder*, and leave what came of them there."""
    torch.set_num_threads(1)
    problems = json.loads((folder / "problems.json").read_text())
    arrays = np.load(folder / "problems.npz")
    slots, seconds = {}, {}
    for name, planner in planners():
        for problem in problems["mean"]:
            key = f"{name}|{problem['name']}"
            slots[key], seconds[key] = planned(problem, arrays[problem["name"]], planner)
    if module("vllm_ascend.eplb.core.policy.policy_abstract"):
        for problem in problems["steps"]:
            counts = arrays[problem["name"]].astype(np.float64)
            for name, samples in (("FlashLB", 64), ("FlashLB, single steps", len(counts))):
                slots[f"{name}|{problem['name']}"] = flashlb(counts, problem, samples)
    np.savez(folder / "slots.npz", **slots)
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
