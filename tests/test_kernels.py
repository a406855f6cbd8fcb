"""The same answers on every machine: under other BLAS kernels, and without the vector instructions of NumPy."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.thorough
# Kernels that every x86-64 processor runs, beside the one that is chosen for it.
KERNELS = {
    "chosen": {},
    "SSE3": {"OPENBLAS_CORETYPE": "Prescott"},
    "no vectors": {"NPY_DISABLE_CPU_FEATURES": "found"},
}
CODE = """
import json, sys, warnings
import numpy as np
import moetrace as mt
from moetrace.forecasting.evaluation import InMemory
from moetrace.placement.study import place

found, cutoffs, kept = {}, [1000, 2000], InMemory()
trace = mt.read_trace("sample_traces/gpt-moe-8e-a.parquet").select([4], last=3000)
predictors = [mt.WindowMean(), mt.Level(), mt.Arima(order=(1, 0, 0)), mt.Auto()]
for redundant, dispatch, ridge in ((0, "even", 0), (4, "even", 0), (4, "lp", 0), (4, "nearest", None), (4, "even", 150)):
    planning = mt.Planning(4, redundant, dispatch=dispatch, nodes=2, time=mt.StepTime(ridge))
    placed = place(trace, predictors, planning, cutoffs=cutoffs, results=kept)
    scores = placed.frames["scores"]
    found[f"{redundant} {dispatch} {ridge}"] = {
        "plans": placed.slots,
        "moved": scores["moved"].tolist(),
        "balance": scores["balance"].tolist(),
        "verdict": [placed.verdict.verdict, placed.verdict.policy, placed.verdict.holds, placed.best],
    }
wide = np.random.default_rng(0).lognormal(0, 1, (40, 6, 64))
for name, weight in (("mean", wide.sum(axis=0)), ("steps", wide)):
    plan, _, _ = mt.rebalance_experts(weight, 80, 8, 2, 8)
    again, _, _ = mt.rebalance_experts(weight[..., ::-1], 80, 8, 2, 8, before=plan)
    found[name] = {"plans": plan.tolist(), "again": again.tolist()}
test = mt.evaluate(trace, predictors, [1000], cutoffs)
found["errors"] = {"error_rate": test.scores["error_rate"].tolist(), "state": test.scores["state"].tolist()}
json.dump(found, sys.stdout)
"""
CLOSE = ("balance", "error_rate")


def answers(kernel):
    """What the program plans, scores and says under that *kernel*, computed by a process of its own."""
    own = dict(KERNELS[kernel])
    if own.get("NPY_DISABLE_CPU_FEATURES"):
        own["NPY_DISABLE_CPU_FEATURES"] = " ".join(np.show_config("dicts")["SIMD Extensions"]["found"])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **own}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def chosen():
    """The answers under the kernel of this processor."""
    return answers("chosen")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one kernel")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "chosen"])
def test_plans_scores_and_verdicts_are_the_same_under_every_kernel(kernel, chosen):
    """Plans, moves and verdicts equal; errors and balances to a millionth, far below the digits that are shown."""
    for name, own in answers(kernel).items():
        for field, value in own.items():
            if field in CLOSE:
                assert value == pytest.approx(chosen[name][field], rel=1e-6), (name, field)
            else:
                assert value == chosen[name][field], (name, field)
