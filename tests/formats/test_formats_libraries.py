"""Dumps that need a library of their own, what is said without it, and lookalikes that are refused."""

import builtins

import numpy as np
import pytest
from dumps import scalars, tensorboard, tensorrt

from moetrace import ReadOptions, TraceError, read_trace


@pytest.mark.parametrize(
    ("name", "library", "dump"),
    [("safetensors", "safetensors", tensorrt), ("tensorboard", "tensorboard", tensorboard)],
)
def test_a_missing_library_is_named_with_how_to_get_it(small, tmp_path, monkeypatch, name, library, dump):
    """One line, for those who installed moetrace alone."""
    path = dump(small, tmp_path)
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == library:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(TraceError, match=rf'pip install "moetrace\[{name}\]"'):
        read_trace(path)


def test_tensorrt_ranks_with_other_layers_are_stages(small, tmp_path):
    """And every rank has to be there."""
    from safetensors.numpy import save_file

    (tmp_path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank, layer in enumerate(small.layers):
        load = small.layer(layer)
        save_file(
            {f"{s}_{layer}": load.counts[i] for i, s in enumerate(load.steps)}, tmp_path / f"rank{rank}.safetensors"
        )

    found = read_trace(tmp_path)

    assert np.array_equal(small.counts, found.counts)
    assert 2 == found.info.top_k


def test_tags_are_matched_by_a_pattern(small, tmp_path):
    """Other tags are passed over; two kinds that match are refused."""
    rows = [
        (int(step), {f"L{j}.load.{e}": float(c) for j, row in enumerate(small.counts[i]) for e, c in enumerate(row)})
        for i, step in enumerate(small.steps)
    ]
    folder = scalars(tmp_path / "runs", rows)

    found = read_trace(folder, format=r"tensorboard:pattern=L(?P<layer>\d+)\.load\.(?P<expert>\d+)")

    assert np.array_equal(small.counts, found.counts)
    for spec, said in (
        (":pattern=(", "not a regular expression"),
        (":pattern=L", "names no layer and expert"),
        (None, "holds no rows"),
    ):
        with pytest.raises(TraceError, match=said):
            read_trace(folder, format=spec)


def test_two_kinds_of_tags_are_refused(tmp_path):
    """Which of them holds the counts cannot be told."""
    folder = scalars(tmp_path / "runs", [(1, {"a/layer_0/expert_0": 1.0, "b/layer_0/expert_0": 2.0})])

    with pytest.raises(TraceError, match=r"tags like a/layer_#/expert_# and like b/layer_#/expert_#.*--pattern"):
        read_trace(folder)


def test_utilisation_in_tags_needs_the_totals(small, tmp_path):
    """As Automodel logs it."""
    rows = [
        (int(step), {f"moe_expert_utilization/layer_0_expert_{e}": c / 25 for e, c in enumerate(small.counts[i, 0])})
        for i, step in enumerate(small.steps)
    ]
    folder = scalars(tmp_path / "runs", rows)

    with pytest.raises(TraceError, match="utilisation"):
        read_trace(folder)
    found = read_trace(folder, options=ReadOptions(tokens_per_step=100), format=":experts=4")
    assert np.array_equal(small.counts[:, :1], found.counts)


LOOKALIKES = {
    "vllm.jsonl": ('{"step": 1, "window_size": 100, "window_expert_load": [[1, 2]]}\n', "windows that overlap"),
    "mindspeed.log": (
        "[expert load statistics] iter 1: rank 0 dp0 pp0, device expert load: min 1.0",
        "smoothed load of devices",
    ),
}


@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.parametrize("format", [None, "jsonl"])
def test_lookalikes_are_refused_with_the_reason(tmp_path, name, format):
    """No format makes counts of them."""
    text, said = LOOKALIKES[name]
    (tmp_path / name).write_text(text)

    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path / name, format=format)


def test_tensors_of_bfloat16_are_read_and_said_to_be_rounded(tmp_path):
    """NumPy has no such type of its own."""
    import ml_dtypes
    from safetensors.numpy import save_file

    (tmp_path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 1}')
    counts = np.array([300, 301, 5, 1001])
    save_file({"1_0": counts.astype(ml_dtypes.bfloat16)}, tmp_path / "rank0.safetensors")

    found = read_trace(tmp_path)

    assert [[[300, 300, 5, 1000]]] == found.counts.tolist()
    assert "rounded" in [finding.name for finding in found.info.findings]
