"""Plans as serving systems read them: every map says the same."""

import json

import pytest

from moetrace.placement.expert_maps import MAPS, ascend, sglang, tensorrt_llm

# Two MoE layers after a dense one, six slots for five experts on three GPUs.
SLOTS = {1: [[0, 4], [1, 2], [3, 0]], 3: [[2, 1], [0, 4], [3, 4]]}


def test_the_map_of_ascend_has_each_device_of_each_moe_layer():
    """MoE layers are counted from 0, whatever their number in the model is."""
    found = json.loads(ascend(SLOTS))

    assert 2 == found["moe_layer_count"]
    assert [0, 1] == [layer["layer_id"] for layer in found["layer_list"]]
    for layer, gpus in zip(found["layer_list"], SLOTS.values()):
        assert len(gpus) == layer["device_count"]
        assert list(enumerate(gpus)) == [(d["device_id"], d["device_expert"]) for d in layer["device_list"]]


def test_the_map_of_sglang_has_a_row_for_every_layer_of_the_model():
    """Layers without a plan have their experts in order; no other key, which SGLang would take for an argument."""
    found = json.loads(sglang(SLOTS))

    in_order = [0, 1, 2, 3, 4, 0]
    assert {"physical_to_logical_map": [in_order, [0, 4, 1, 2, 3, 0], in_order, [2, 1, 0, 4, 3, 4]]} == found


def test_the_map_of_tensorrt_llm_is_yaml_with_whole_numbers_as_keys():
    """JSON would turn the numbers of the layers into text."""
    yaml = pytest.importorskip("yaml")

    found = yaml.safe_load(tensorrt_llm(SLOTS))

    assert {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {1: [0, 4, 1, 2, 3, 0], 3: [2, 1, 0, 4, 3, 4]},
    } == found


def test_maps_have_files_of_their_own():
    """None takes the place of another."""
    assert len(MAPS) == len({kind.ending for kind in MAPS})
