"""Files of resident sets, read by the rules of the programs that they are for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from moetrace import SettingError
from moetrace.placement.systems import write_files
from moetrace.residency.runtimes import KTRANSFORMERS, RUNTIMES, ResidentSets, saved

SHARES = {3: [0.1, 0.4, 0.2, 0.3], 5: [0.25, 0.25, 0.0, 0.5]}
EQUAL = ResidentSets({3: [1, 3], 5: [3, 0]}, SHARES)
UNEQUAL = ResidentSets({3: [1, 3, 2], 5: []}, SHARES)


@pytest.fixture
def written(tmp_path):
    """The files of sets by the name of the system, as its content and its flags."""

    def write(sets):
        files, failed = write_files(sets, tmp_path / "experts", RUNTIMES, "file")
        return {file["system"]: (Path(file["path"]).read_bytes(), file["flags"]) for file in files}, failed

    return write


def test_every_runtime_gets_a_file(written):
    """Each with an ending of its own."""
    files, failed = written(EQUAL)

    assert [runtime.name for runtime in RUNTIMES] == list(files)
    assert [] == failed
    assert len(RUNTIMES) == len({runtime.ending for runtime in RUNTIMES})


@pytest.mark.parametrize("sets", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_lists_have_the_experts_in_order(written, sets):
    """As JSON, and as rows of CSV."""
    files, _ = written(sets)
    rows = [line.split(",") for line in files["CSV"][0].decode().splitlines()]

    assert {str(layer): own for layer, own in sets.sets.items()} == json.loads(files["JSON"][0])
    assert ["layer", "rank", "expert", "share"] == rows[0]
    expected = [(layer, i, e) for layer, own in sets.sets.items() for i, e in enumerate(own, 1)]
    assert expected == [tuple(map(int, row[:3])) for row in rows[1:]]
    assert all(float(row[3]) == SHARES[int(row[0])][int(row[2])] for row in rows[1:])


def test_exllamav3_keeps_the_sets_on_the_gpu(written):
    """It sorts experts by their counts, and keeps all but the last so many."""
    content, flags = written(EQUAL)[0]["ExLlamaV3"]
    counts = json.loads(content)

    assert flags.endswith("-mcs 2")
    assert written(ResidentSets({0: [1]}, {0: SHARES[3]}))[0]["ExLlamaV3"][1].endswith("-mcs 3")
    assert "EXL3_MOE_CPU_SWAP=0" in flags
    for key in ("model.layers.3.mlp", "model.layers.3.block_sparse_moe", "model.language_model.layers.3.mlp"):
        order = sorted(range(4), key=lambda e: -counts[key][e])
        assert [1, 3] == order[: 4 - 2]
    assert [3, 0] == sorted(range(4), key=lambda e: -counts["model.layers.5.mlp"][e])[:2]


def test_exllamav3_takes_no_unequal_sets(written):
    """What it cannot do is said, and the other files are written."""
    files, failed = written(UNEQUAL)

    assert ["no file for ExLlamaV3: it keeps as many experts in every layer: use --slots"] == failed
    assert "KTransformers" in files


@pytest.mark.parametrize("sets", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_ktransformers_puts_the_sets_on_the_gpu(written, sets):
    """The highest cells of all layers together, as many as the flags say, are those of the sets."""
    torch = pytest.importorskip("torch")
    content, flags = written(sets)[0]["KTransformers"]
    counts = torch.load(io.BytesIO(content), weights_only=True)["logical_count"]
    assert (1, 6, 4) == tuple(counts.shape)
    number = float(flags.split()[-1])
    number = int(number * 2) if "--kt-num-gpu-experts" in flags else int(2 * 4 * number)
    _, top = torch.topk(counts.sum(dim=0).float().view(-1), k=number, largest=True, sorted=False)
    mask = torch.zeros(24, dtype=torch.bool)
    mask[top] = True

    assert {(layer, e) for layer, own in sets.sets.items() for e in own} == {
        (int(layer), int(e)) for layer, e in mask.view(6, 4).nonzero()
    }


@pytest.mark.parametrize("total", range(2, 21))
def test_the_ratio_of_ktransformers_is_that_many_experts(total):
    """It multiplies by the number of all, and cuts."""
    shares = [1 / 7] * 7
    sets = ResidentSets(
        {0: list(range(min(total, 7))), 1: list(range(max(0, total - 7) // 2)), 2: []}, dict.fromkeys(range(3), shares)
    )
    ratio = float(KTRANSFORMERS.flags(sets, "x").split()[-1])

    assert sets.total == int(3 * 7 * ratio)


def test_tensors_are_saved_as_torch_saves_them():
    """Of every shape, also without torch: the archive is read back by it."""
    torch = pytest.importorskip("torch")
    tensors = {"a": np.arange(24).reshape(2, 3, 4), "b": np.array([5]), "c": np.zeros((2, 0), np.int64)}
    found = torch.load(io.BytesIO(saved(tensors)), weights_only=True)

    assert {name: own.tolist() for name, own in tensors.items()} == {n: own.tolist() for n, own in found.items()}


def ranking(content):
    """Experts by layer as the fork of llama.cpp ranks them: by how many lines name them, then by number."""
    counts = {}
    for line in content.decode().splitlines():
        assert len(line) < 4095
        position, layer, *experts = map(int, line.split(","))
        assert position >= 0
        for expert in experts:
            counts.setdefault(layer, {}).setdefault(expert, 0)
            counts[layer][expert] += 1
    return {layer: sorted(own, key=lambda e: (-own[e], e)) for layer, own in counts.items()}


@pytest.mark.parametrize("sets", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_llama_cpp_caches_the_sets(written, sets):
    """In their order, so that fewer slots keep the most loaded ones."""
    content, flags = written(sets)[0]["llama.cpp (thecodacus, branch perf)"]

    assert {layer: own for layer, own in sets.sets.items() if own} == ranking(content)
    assert f"--moe-cache-slots {max(map(len, sets.sets.values()))}" in flags


@pytest.mark.slow
def test_llama_cpp_reads_lines_of_many_experts(written):
    """None is longer than its buffer."""
    many = list(range(1500))[::-1]
    content, _ = written(ResidentSets({0: many}, {0: [1 / 1500] * 1500}))[0]["llama.cpp (thecodacus, branch perf)"]

    assert many[:700] == ranking(content)[0][:700]


def test_esft_trains_the_sets(written):
    """Its list for each layer by name, and nothing else of the model."""
    content, _ = written(EQUAL)[0]["ESFT"]

    assert json.loads(content) == {
        "experts": {"3": [1, 3], "5": [3, 0]}, "shared_experts": False, "non_expert_modules": False,
    }  # fmt: skip


def test_layers_are_renumbered_together():
    """As far from the first as they were."""
    moved = EQUAL.with_first_layer(0)

    assert {0: [1, 3], 2: [3, 0]} == moved.sets
    assert {0: SHARES[3], 2: SHARES[5]} == moved.shares


def test_a_layer_that_the_model_has_not_is_refused(written):
    """Where a file has a row for every layer."""
    _, failed = written(ResidentSets(EQUAL.sets, SHARES, model_layers=5))

    assert ["no file for KTransformers: layer 5 is not one of the 5 layers of the model: check --model-layers and "
            "--first-layer"] == failed  # fmt: skip
    with pytest.raises(SettingError, match="layer 20000 is not a layer of a model"):
        ResidentSets({20000: [0]}, {20000: [1.0]}).every_layer()
