"""Plans as serving systems read them: every map says the same."""

import json
import shlex

import numpy as np
import pytest

from moetrace import SettingError, TraceError, rebalance_experts
from moetrace.placement.systems import SYSTEMS, read_plan
from moetrace.placement.systems.base import Deployment
from moetrace.placement.systems.eplb import weight as eplb_weight
from moetrace.placement.systems.sglang import loads as sglang_counts
from moetrace.placement.systems.sglang import slots as sglang
from moetrace.placement.systems.tensorrt_llm import load_balancer as tensorrt_llm
from moetrace.placement.systems.vllm_ascend import expert_map as ascend

# Two MoE layers after a dense one, six slots for five experts on three GPUs.
SLOTS = {1: [[0, 4], [1, 2], [3, 0]], 3: [[2, 1], [0, 4], [3, 4]]}
LOADS = {1: [0.4, 0.1, 0.2, 0.1, 0.2], 3: [0.1, 0.1, 0.3, 0.2, 0.3]}
PLAN = Deployment(SLOTS, LOADS)


def test_the_map_of_ascend_has_each_device_of_each_moe_layer():
    """MoE layers are counted from 0, whatever their number in the model is."""
    found = json.loads(ascend(PLAN))

    assert 2 == found["moe_layer_count"]
    assert [0, 1] == [layer["layer_id"] for layer in found["layer_list"]]
    for layer, gpus in zip(found["layer_list"], SLOTS.values()):
        assert len(gpus) == layer["device_count"]
        assert list(enumerate(gpus)) == [(d["device_id"], d["device_expert"]) for d in layer["device_list"]]


def test_the_map_of_sglang_has_a_row_for_every_layer_of_the_model():
    """Layers without a plan have their experts in order; no other key, which SGLang would take for an argument."""
    found = json.loads(sglang(PLAN))

    in_order = [0, 1, 2, 3, 4, 0]
    assert {"physical_to_logical_map": [in_order, [0, 4, 1, 2, 3, 0], in_order, [2, 1, 0, 4, 3, 4]]} == found


def test_the_map_of_tensorrt_llm_is_yaml_with_whole_numbers_as_keys():
    """JSON would turn the numbers of the layers into text."""
    yaml = pytest.importorskip("yaml")

    found = yaml.safe_load(tensorrt_llm(PLAN))

    assert {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {1: [0, 4, 1, 2, 3, 0], 3: [2, 1, 0, 4, 3, 4]},
    } == found


def test_the_map_is_what_the_loaders_of_vllm_ascend_and_mindie_ask_for():
    """Layers in order, as many slots on each device, and never an expert twice on one: it would hide the other."""
    document = json.loads(ascend(PLAN))

    for number in range(document["moe_layer_count"]):
        layer = document["layer_list"][number]
        devices = np.array([device["device_expert"] for device in layer["device_list"]], np.int32)
        expert_map = np.full((layer["device_count"], 5), -1)
        for rank, local in enumerate(devices):
            expert_map[rank, local] = np.arange(len(local))
        assert (number, list(range(3))) == (layer["layer_id"], [own["device_id"] for own in layer["device_list"]])
        assert (expert_map >= 0).sum() == devices.size == 5 + PLAN.redundant
        assert (expert_map >= 0).any(axis=0).all()


@pytest.mark.parametrize("model_layers", [0, 6])
def test_the_yaml_is_what_the_loader_of_tensorrt_llm_asks_for(model_layers):
    """Every layer by its number, each with as many slots as said, as many on each rank, and every expert."""
    yaml = pytest.importorskip("yaml")
    plan = Deployment(SLOTS, LOADS, model_layers)

    found = yaml.safe_load(tensorrt_llm(plan))

    rows = found["initial_global_assignments"]
    assert {"num_slots", "initial_global_assignments", "layer_updates_per_iter"} == set(found)
    assert set(range(1, model_layers) if model_layers else SLOTS) == set(rows)
    assert 0 == found["num_slots"] % plan.gpus
    assert all(found["num_slots"] == len(row) and set(range(5)) == set(row) for row in rows.values())


def test_files_that_differ_have_endings_of_their_own():
    """None takes the place of another; one that two systems read is written once."""
    files = [file for system in SYSTEMS.values() for file in system.files]

    assert len({file.ending for file in files}) == len({file.content for file in files}) == len(files) - 1


def test_sglang_plans_by_the_predicted_load():
    """Whole tokens; layers that are not in the plan have the same for each expert."""
    found = json.loads(sglang_counts(Deployment(SLOTS, LOADS, 6)))["logical_count"]

    assert 6 == len(found)
    assert [[400_000, 100_000, 200_000, 100_000, 200_000], [200_000] * 5] == [found[1], found[5]]


def test_eplb_gets_the_predicted_load_as_an_array(tmp_path):
    """(layers, experts), MoE layers alone; what our planner with EPLB's arguments takes, too."""
    (tmp_path / "weight.npy").write_bytes(eplb_weight(PLAN))

    weight = np.load(tmp_path / "weight.npy")

    assert weight / weight.sum(axis=1, keepdims=True) == pytest.approx(np.array([*LOADS.values()]))
    assert [2, 1, 1, 1, 1] == rebalance_experts(weight, 6, 1, 1, 3)[2][0].tolist()


def test_layers_get_their_numbers_in_the_model():
    """The first the one that is given, the others as far from it as they were."""
    moved = PLAN.with_first_layer(0)

    assert ({0: SLOTS[1], 2: SLOTS[3]}, {0: LOADS[1], 2: LOADS[3]}) == (moved.slots, moved.loads)
    assert PLAN == PLAN.with_first_layer(None)


def test_layers_after_those_of_the_trace_are_filled():
    """SGLang wants every layer; TensorRT-LLM those from the first on, and stops at one that is missing."""
    rows = json.loads(sglang(Deployment(SLOTS, LOADS, 6)))["physical_to_logical_map"]
    text = tensorrt_llm(Deployment(SLOTS, LOADS, 5)).decode()

    assert (6, [0, 1, 2, 3, 4, 0]) == (len(rows), rows[5])
    assert ["1:", "2:", "3:", "4:"] == [line.split()[0] for line in text.splitlines()[3:]]


def flags_of(plan, path):
    """The flags of each system for its first file at *path*."""
    return {name: system.files[0].flags(plan, path) for name, system in SYSTEMS.items() if system.files}


def test_flags_fit_the_file():
    """The number of GPUs and of replicas; without replicas vllm-ascend needs no key for them."""
    flags = flags_of(PLAN, "FILE")
    plain = flags_of(Deployment({0: [[0], [1]]}), "FILE")["vllm-ascend"]

    assert (
        "--init-expert-location FILE --ep-size 3 --ep-num-redundant-experts 1 --ep-dispatch-algorithm dynamic"
        == flags["SGLang"]
    )
    assert '"expert_map_path": "FILE", "num_redundant_experts": 1' in flags["vllm-ascend"]
    assert "num_redundant" not in plain
    assert '"eplb": {"level": 1, "expert_map_file": "FILE"}' == flags["MindIE"]
    assert "moe_expert_parallel_size: 3" in flags["TensorRT-LLM"]
    assert "num_replicas=6, num_groups=1, num_nodes=1, num_gpus=3" in flags["DeepSeek's EPLB"]
    grouped = Deployment(SLOTS, LOADS, groups=4, nodes=2)
    assert "num_groups=4, num_nodes=2" in flags_of(grouped, "FILE")["DeepSeek's EPLB"]


@pytest.mark.parametrize(
    "kind", [system.files[0] for system in SYSTEMS.values() if system.read], ids=lambda kind: kind.ending
)
def test_a_plan_that_was_written_is_read_back(kind, tmp_path):
    """Layer by layer, GPU by GPU."""
    path = tmp_path / f"plan{kind.ending}"
    path.write_bytes(kind.content(PLAN))

    plans = read_plan(path, [1, 3], 5, 3)

    assert {layer: [sorted(own) for own in gpus] for layer, gpus in SLOTS.items()} == {
        layer: plan.experts for layer, plan in plans.items()
    }


def test_the_array_of_eplb_and_other_yaml_are_read(tmp_path):
    """Rows are the MoE layers; YAML may be in one line, or a line for each slot."""
    flat = [[0, 4, 1, 2, 3, 0], [2, 1, 0, 4, 3, 4]]
    np.save(tmp_path / "plan.npy", np.array(flat))
    line = f"{{initial_global_assignments: {{1: {flat[0]}, 3: {flat[1]}}}, layer_updates_per_iter: 0, num_slots: 6}}\n"
    (tmp_path / "line.yaml").write_text(line)
    items = "".join(f"  {n}:\n" + "".join(f"  - {e}\n" for e in row) for n, row in zip((1, 3), flat))
    (tmp_path / "items.yml").write_text(f"num_slots: 6\ninitial_global_assignments:\n{items}")

    found = [read_plan(tmp_path / name, [1, 3], 5, 3) for name in ("plan.npy", "line.yaml", "items.yml")]

    assert all([[0, 4], [1, 2], [0, 3]] == plans[1].experts for plans in found)
    assert all([[1, 2], [0, 4], [3, 4]] == plans[3].experts for plans in found)


def test_flags_can_be_copied_whatever_the_path_is():
    """A shell takes each as one word."""
    path = "my run's plans/4-gpus.json"
    flags = flags_of(PLAN, path)

    assert path == shlex.split(flags["SGLang"])[1]
    assert path == json.loads(shlex.split(flags["vllm-ascend"])[2])["eplb_config"]["expert_map_path"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gone.json", None, "No such file"),
        ("x.json", "[", "is not a plan of a known system"),
        ("x.json", "{}", "is not a plan of a known system"),
        ("x.json", '{"physical_to_logical_map": [[0, 1, 2]]}', "layer 1 is missing"),
        ("x.json", '{"physical_to_logical_map": [[], [0, 1, 2, 3]]}', "4 slots do not fill 3 GPUs"),
        ("x.json", '{"physical_to_logical_map": [[], [0, 1, 1]]}', "expert 2 is in no slot"),
        ("x.json", '{"physical_to_logical_map": [[], [0, 1, 7]]}', "expert 2 is in no slot"),
        ("x.json", '{"physical_to_logical_map": [[], [0, 1, 2, 3, 4, 5]]}', "expert 3 is none of the 3 experts"),
        ("x.json", '{"physical_to_logical_map": [[], ["a"]]}', "not a list of whole numbers"),
        ("x.json", '{"physical_to_logical_map": [[], [[0], [0, 1]]]}', "not a list of whole numbers"),
        (
            "x.json",
            '{"layer_list": [{"device_list": [{"device_id": 0, "device_expert": [0, 1, 2]}]}]}',
            "is a plan of 1 GPUs, not of 3; see --gpus",
        ),
        ("x.npy", "x", "is not a plan of a known system"),
        ("x.yaml", "num_slots: 3", "is not a plan of a known system"),
        ("x.yaml", "{a: [", "is not a plan of a known system"),
        ("x.json", "[" * 100_000, "is not a plan of a known system"),
    ],
)
def test_a_file_that_is_no_plan_is_one_line(name, text, said, tmp_path):
    """With the file and the way out."""
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(TraceError) as error:
        read_plan(tmp_path / name, [1], 3, 3)

    assert said in str(error.value)
    assert name in str(error.value)


@pytest.mark.thorough
def test_the_plan_that_runs_today_is_scored_and_changed(moetrace, settled, tmp_path):
    """It has a row of its own; moves are counted from it, and the plan to deploy is near it."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    argv = ("place", tmp_path / "settled.parquet", "--gpus", "4", "--predictor", "window_mean", "--cutoffs", "3000")
    first = moetrace(*argv, "--json").json
    path = next(own["path"] for own in first["deploy"] if own["system"] == "SGLang")

    again = moetrace(*argv, "--plan", tmp_path / "cwd" / path, "--json").json

    moved = {row["strategy"]: row["moved"] for row in again["summary"] if row["state"] == "all"}
    assert 0 == moved["deployed"]
    assert [own["experts"] for own in first["plans"]] == [own["experts"] for own in again["plans"]]
    assert "deployed plan" in moetrace(*argv, "--plan", tmp_path / "cwd" / path).out
    sized = moetrace(*argv, "--plan", tmp_path / "cwd" / path, "--expert-bytes", "1MB", "--json").json["summary"]
    assert all(row["moved_bytes"] == pytest.approx(row["moved"] * 8 * 2 * 1e6) for row in sized)


def test_a_layer_beyond_those_of_the_model_is_refused():
    """A trace that counts its layers from 1 would make a file that is one layer late."""
    slots = {layer: [[0, 1], [2, 3]] for layer in (2, 4)}

    assert 5 == len(json.loads(sglang(Deployment(slots, {}, 5)))["physical_to_logical_map"])
    assert 4 == len(json.loads(sglang(Deployment(slots, {}, 4).with_first_layer(1)))["physical_to_logical_map"])
    with pytest.raises(
        SettingError, match=r"layer 4 is none of the 4 layers of the model, 0 to 3: check --model-layers.*--first-layer"
    ):
        sglang(Deployment(slots, {}, 4))


@pytest.mark.slow
def test_the_model_may_number_layers_otherwise(moetrace, settled, tmp_path):
    """Files and the plan that is read have the numbers of the model, whatever the trace calls its first layer."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    argv = ("place", tmp_path / "settled.parquet", "--gpus", "4", "--predictor", "window_mean", "--cutoffs", "3000")
    found = moetrace(*argv, "--first-layer", "5", "--model-layers", "8", "--json").json
    paths = {own["system"]: tmp_path / "cwd" / own["path"] for own in found["deploy"]}

    rows = json.loads(paths["SGLang"].read_text())["physical_to_logical_map"]
    plan = [
        [expert for own in found["plans"] if own["layer"] == layer for expert in own["experts"]] for layer in (0, 1)
    ]
    again = moetrace(*argv, "--first-layer", "5", "--plan", paths["TensorRT-LLM"], "--json").json

    assert (8, plan, list(range(8))) == (len(rows), rows[5:7], rows[0])
    assert found["plans"] == again["plans"]
    assert all(path.is_file() for path in paths.values())
    assert len(set(found["files"])) == len(found["files"]) == len(paths) - 1
