"""Plans are read by SGLang's own loader, and planned anew by its own planner, as the flags say."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="`make test-systems` installs it")
from sglang_loader import WHEEL, loader  # noqa: E402 - only where torch is

from moetrace import synthetic_trace  # noqa: E402
from moetrace.placement.dispatch import nearest_table  # noqa: E402
from moetrace.placement.plan import place  # noqa: E402
from moetrace.placement.systems import SYSTEMS  # noqa: E402
from moetrace.placement.systems.base import Deployment  # noqa: E402
from moetrace.synthetic import settling  # noqa: E402

pytestmark = pytest.mark.skipif(WHEEL is None, reason="SGLang's wheel is not installed: make test-systems")

EXPERTS, GPUS, REDUNDANT, LAYERS = 16, 4, 8, 5


@pytest.fixture(scope="module")
def plan():
    """Two MoE layers of a model of five, after a dense one."""
    trace = synthetic_trace([settling(500, steps=1000, experts=EXPERTS)] * 2)
    loads = {layer + 1: trace.layer(layer).last(500).mean_shares for layer in (0, 1)}
    slots = {layer: place(share, GPUS, REDUNDANT).experts for layer, share in loads.items()}
    return Deployment(slots, {layer: share.tolist() for layer, share in loads.items()}, LAYERS)


def written(plan, folder, use="", system="SGLang"):
    """The path of the file that the system uses so, and its flags."""
    kind = next(file for file in SYSTEMS[system].files if file.use == use)
    path = folder / f"plan{kind.ending}"
    path.write_bytes(kind.content(plan))
    return path, kind.flags(plan, str(path))


@pytest.mark.parametrize("backend", ["deepep", "none"])
@pytest.mark.parametrize("rank", range(GPUS))
def test_sglang_loads_the_plan(monkeypatch, plan, tmp_path, rank, backend):
    """Each slot holds the expert that the plan says; layers without a plan have theirs in order."""
    _, flags = written(plan, tmp_path)
    module = loader(monkeypatch, flags, LAYERS, EXPERTS, backend=backend)

    found = module.compute_initial_expert_location_metadata(None, rank)

    rows = found.physical_to_logical_map.numpy()
    assert ((LAYERS, EXPERTS + REDUNDANT), GPUS) == (rows.shape, found.ep_size)
    for layer in range(LAYERS):
        assert plan.flat.get(layer, [slot % EXPERTS for slot in range(EXPERTS + REDUNDANT)]) == rows[layer].tolist()
    if backend == "none":  # else those that are nearer hide the others
        replicas = found.logical_to_all_physical_map_num_valid.numpy()
        assert replicas[1].tolist() == np.bincount(plan.flat[1], minlength=EXPERTS).tolist()
    assert EXPERTS + REDUNDANT > found.logical_to_rank_dispatch_physical_map.max()


def test_sglang_plans_by_the_predicted_load(monkeypatch, plan, tmp_path):
    """Its own planner gets the load, not the replicas: what it makes of it is nearly even."""
    _, flags = written(plan, tmp_path, "planning by itself")
    module = loader(monkeypatch, flags, LAYERS, EXPERTS, dispatch="dynamic", backend="none")

    found = module.compute_initial_expert_location_metadata(None, 0)

    rows, copies = found.physical_to_logical_map.numpy(), found.logical_to_all_physical_map_num_valid.numpy()
    for layer, share in plan.loads.items():
        gpu_loads = (np.array(share) / copies[layer])[rows[layer]].reshape(GPUS, -1).sum(axis=1)
        plain = np.array(share)[np.arange(EXPERTS)].reshape(GPUS, -1).sum(axis=1)
        assert gpu_loads.max() * GPUS < 1.1 < plain.max() * GPUS
    assert (copies.sum(axis=1) == EXPERTS + REDUNDANT).all()


def test_eplb_takes_the_predicted_load(monkeypatch, plan, tmp_path):
    """The call that is printed, with DeepSeek's planner as SGLang ships it."""
    _, flags = written(plan, tmp_path)
    loader(monkeypatch, flags, LAYERS, EXPERTS)
    from sglang.srt.eplb.eplb_algorithms import deepseek

    call = written(plan, tmp_path, system="DeepSeek's EPLB")[1]
    planner = functools.partial(deepseek.rebalance_experts, enable_hierarchical=True)
    phy2log, _, logcnt = eval(call, {"torch": torch, "numpy": np, "rebalance_experts": planner})

    assert ((2, EXPERTS + REDUNDANT), (2, EXPERTS)) == (tuple(phy2log.shape), tuple(logcnt.shape))
    for row, counts, share in zip(phy2log.numpy(), logcnt.numpy(), plan.loads.values()):
        assert (np.array(share) / counts)[row].reshape(GPUS, -1).sum(axis=1).max() * GPUS < 1.1


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_nearest_replica_is_the_one_that_sglang_sends_tokens_to(monkeypatch, plan, tmp_path, nodes):
    """Every rank, layer and expert: same GPU, same node, or the choice that SGLang draws once."""
    _, flags = written(plan, tmp_path)
    module = loader(monkeypatch, flags, LAYERS, EXPERTS, nodes=nodes)

    found = [module.compute_initial_expert_location_metadata(None, rank) for rank in range(GPUS)]

    theirs = np.array([own.logical_to_rank_dispatch_physical_map.numpy() for own in found])
    phy2log = found[0].physical_to_logical_map.numpy()
    assert np.array_equal(theirs, nearest_table(phy2log, GPUS, nodes))
