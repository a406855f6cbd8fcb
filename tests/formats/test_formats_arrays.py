"""Arrays wherever they lie: axes, a file or an array for each layer or step, half precision, documents and tensors."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import long_table

from moetrace import ReadOptions, SettingError, TraceError, read_trace


def assumed(trace, part):
    """Whether *part* is said to be assumed."""
    return any(part in text for text in trace.info.assumptions)


def test_axes_are_said_with_their_sizes(small, tmp_path):
    """Which of them is what nobody can see."""
    np.save(tmp_path / "dump.npy", np.moveaxis(small.counts, 1, 0))

    found = read_trace(tmp_path / "dump.npy", options=ReadOptions(accept=("cumulative", "smoothed")))

    assert assumed(found, "axes are steps, layers, experts: 2 x 60 x 4")
    turned = read_trace(tmp_path / "dump.npy", format=":axes=layers,steps,experts")
    assert np.array_equal(small.counts, turned.counts)
    assert assumed(turned, "axes are layers, steps, experts: 2 x 60 x 4")


@pytest.mark.parametrize(
    ("axes", "said"),
    [("layers,steps", "with experts"), ("steps,experts", "are 2, and"), ("steps,steps,experts", "each once")],
)
def test_axes_that_do_not_fit_are_refused(small, tmp_path, axes, said):
    """As mistakes in how the command was called."""
    np.save(tmp_path / "dump.npy", small.counts)

    with pytest.raises(SettingError, match=said):
        read_trace(tmp_path / "dump.npy", format=f":axes={axes}")


@pytest.mark.parametrize("axes", ["experts,steps,layers", "layers,experts,steps", "steps,experts,layers"])
def test_any_order_of_axes_is_turned(small, tmp_path, axes):
    """Also in an archive, where other readers would hold it whole."""
    places = ["steps", "layers", "experts"]
    turned = np.transpose(small.counts, [places.index(axis) for axis in axes.split(",")])
    np.savez(tmp_path / "dump.npz", counts=turned, steps=small.steps, layers=small.layers)

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.npz", format=f":axes={axes}").counts)


def test_experts_of_ranks_lie_side_by_side(small, tmp_path):
    """`moe_load_<N>.npy` (layers, ranks, experts of a rank): the name says the axes and the step."""
    for step, counts in zip(small.steps, small.counts):
        np.save(tmp_path / f"moe_load_{step}.npy", counts.reshape(2, 2, 2))

    found = read_trace(list(tmp_path.iterdir()), options=ReadOptions(merge="steps"))

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)
    assert assumed(found, "axes are layers, ranks, experts: 2 x 2 x 2, one step")


@pytest.mark.parametrize("name", ["layer_{}", "{}", "model.layers.{}.mlp.gate"])
def test_an_archive_may_hold_an_array_for_each_layer(small, tmp_path, name):
    """Put side by side by the numbers in their names."""
    arrays = {name.format(layer): small.counts[:, j] for j, layer in enumerate(small.layers)}
    np.savez(tmp_path / "dump.npz", **arrays)

    found = read_trace(tmp_path / "dump.npz")

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("expert_0", "expert_1"), ("train", "test")])
def test_arrays_that_are_no_layers_are_refused(small, tmp_path, names):
    """Numbers in names of another kind say nothing of layers."""
    np.savez(tmp_path / "dump.npz", **dict(zip(names, np.moveaxis(small.counts, 1, 0))))

    with pytest.raises(TraceError, match="none is the counts"):
        read_trace(tmp_path / "dump.npz")


def bfloat16(counts):
    """Counts as bfloat16 has them, as 16-bit numbers."""
    bits = counts.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def large(shape=(40, 2)):
    """Counts up to some thousands, odd and even."""
    return np.random.default_rng(0).multinomial(20_000, np.arange(1, 17) / 136, size=shape)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "text"])
def test_counts_of_half_precision_are_read_and_said_to_be_rounded(tmp_path, kind):
    """Neither as multiples nor as doubled; without a warning of NumPy's, which would fail the test."""
    counts = large()
    expected = (bfloat16(counts).astype(np.uint32) << 16).view(np.float32)
    path = tmp_path / ("dump.jsonl" if kind == "text" else "dump.npy")
    if kind == "float16":
        expected = counts.astype(np.float16)
        np.save(path, expected)
    elif kind == "bfloat16":
        np.save(path, bfloat16(counts).view("V2"))
    else:
        lines = [{"step": i, "counts": step.tolist()} for i, step in enumerate(expected)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = read_trace(path)

    assert np.array_equal(expected.astype(np.int64), found.counts)
    findings = {finding.name: finding.place for finding in found.info.findings}
    assert findings["rounded"].partition(", row")[0] == ("the whole trace" if kind == "text" else "column counts")
    assert not findings.keys() & {"multiplied", "doubled"}


def test_half_precision_that_holds_every_count_is_no_finding(small, tmp_path):
    """Up to 2,048 float16 has all whole numbers."""
    np.save(tmp_path / "dump.npy", small.counts.astype(np.float16))

    found = read_trace(tmp_path / "dump.npy")

    assert np.array_equal(small.counts, found.counts)
    assert () == found.info.findings


def test_multiples_are_not_taken_for_rounding(tmp_path):
    """Counts of eight replicas have as few significant bits where they are small, but not all of them."""
    np.save(tmp_path / "dump.npy", 8 * large())

    assert ["multiplied"] == [finding.name for finding in read_trace(tmp_path / "dump.npy").info.findings]


DOCUMENTS = {
    "load_history": lambda c: {"load_history": [{"logical_expert_load": step} for step in c]},
    "nested lists": lambda c: c,
    "counts": lambda c: {"model": "m", "counts": c},
    "logical_count": lambda c: {"logical_count": c},
    "keys": lambda c: {str(i + 1): {str(j): dict(enumerate(e)) for j, e in enumerate(s)} for i, s in enumerate(c)},
    "words": lambda c: {
        f"step_{i + 1}": {f"layer_{j}": {f"expert_{e}": n for e, n in enumerate(row)} for j, row in enumerate(s)}
        for i, s in enumerate(c)
    },
    "experts outside": lambda c: {
        f"expert_{e}": {f"layer_{j}": {f"step_{i + 1}": c[i][j][e] for i in range(len(c))} for j in range(2)}
        for e in range(4)
    },
    "under a key": lambda c: {"load": {f"step{i + 1}": {f"model.layers.{j}": e for j, e in enumerate(s)} for i, s in enumerate(c)}},
}  # fmt: skip


@pytest.mark.parametrize("form", DOCUMENTS)
def test_documents_are_read_by_their_keys(small, tmp_path, form):
    """By the name of a key, or by what keys number."""
    (tmp_path / "dump.json").write_text(json.dumps(DOCUMENTS[form](small.counts.tolist())))

    found = read_trace(tmp_path / "dump.json")

    assert np.array_equal(small.counts, found.counts)
    assert "json" == found.info.format


@pytest.mark.parametrize("orient", ["split", "records"])
def test_tables_in_documents_are_read(small, tmp_path, orient):
    """A list of objects, or `columns` and `data` as Weights & Biases has them."""
    long_table(small).to_pandas().to_json(tmp_path / "dump.json", orient=orient)

    found = read_trace(tmp_path / "dump.json")

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)


@pytest.mark.parametrize("orient", ["columns", "table", "list"])
def test_tables_by_columns_are_refused_with_a_way(small, tmp_path, orient):
    """They could be taken for arrays."""
    frame = long_table(small).to_pandas()
    text = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    (tmp_path / "dump.json").write_text(text)

    with pytest.raises(TraceError, match=r"is a table by columns.*from_frame\(pandas.read_json\(\"dump.json\"\)\)"):
        read_trace(tmp_path / "dump.json")


def test_one_window_is_one_step(tmp_path):
    """Layer by expert, as keys or as lists."""
    for document in ({"0": {"0": 3, "1": 4}, "1": {"0": 5, "1": 2}}, {"logical_count": [[3.0, 4.0], [5.0, 2.0]]}):
        (tmp_path / "dump.json").write_text(json.dumps(document))

        found = read_trace(tmp_path / "dump.json")

        assert [[[3, 4], [5, 2]]] == found.counts.tolist()
        assert [1] == found.steps.tolist()


def test_idle_experts_without_a_key_are_filled_by_option(tmp_path):
    """As counters leave them out."""
    (tmp_path / "dump.json").write_text(json.dumps({"0": {"0": 3, "2": 4}, "1": {"1": 5}}))

    with pytest.raises(TraceError, match="--idle-experts"):
        read_trace(tmp_path / "dump.json")
    found = read_trace(tmp_path / "dump.json", options=ReadOptions(idle_experts=True, experts=4))
    assert [[[3, 0, 4, 0], [0, 5, 0, 0]]] == found.counts.tolist()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"config": {"lr": 0.1}}, "a key .config. .*load_history, logical_count or counts"),
        ({"a": 1, "b": 2}, "needs one of"),
        ({}, "needs one of"),
        ([], "is a list"),
        ("text", "is a str"),
        ({"counts": [[1, 2], [3]]}, "no array of numbers"),
        ({"load_history": [{"loss": 1}]}, "windows with loss"),
        ({"columns": ["step", "tokens"], "data": [[1]]}, "row 0: has not 2 values"),
    ],
)
def test_other_documents_are_refused_with_what_would_do(tmp_path, document, said):
    """In one line."""
    (tmp_path / "dump.json").write_text(json.dumps(document))

    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path / "dump.json")


@pytest.mark.parametrize(("document", "spec"), [({"0": [1, 2]}, "axes=experts"), ({"counts": [[[1, 2]]]}, "pattern=x")])
def test_settings_that_a_document_has_no_use_for_are_refused(tmp_path, document, spec):
    """An option without effect is a mistake."""
    (tmp_path / "dump.json").write_text(json.dumps(document))

    with pytest.raises(SettingError, match="no use for --"):
        read_trace(tmp_path / "dump.json", format=f":{spec}")


TENSORS = {
    "a tensor": lambda t, c: t.tensor(c),
    "a dict": lambda t, c: {"counts": t.tensor(c), "step": 3},
    "by layer": lambda t, c: {f"model.layers.{j}.mlp": t.tensor(c[:, j]) for j in range(c.shape[1])},
    "numbers as keys": lambda t, c: {j: t.tensor(c[:, j]) for j in range(c.shape[1])},
    "a list of steps": lambda t, c: [t.tensor(step) for step in c],
    "bfloat16": lambda t, c: t.tensor(c).to(t.bfloat16),
    "with a gradient": lambda t, c: {"load": t.tensor(c, dtype=t.float32, requires_grad=True)},
}


@pytest.mark.parametrize("form", TENSORS)
def test_tensors_are_read_like_arrays(small, tmp_path, form):
    """Whatever torch's own restricted reader builds."""
    torch = pytest.importorskip("torch")
    torch.save(TENSORS[form](torch, small.counts), tmp_path / "dump.pt")

    found = read_trace(tmp_path / "dump.pt")

    assert np.array_equal(small.counts, found.counts)
    assert "torch" == found.info.format


@pytest.mark.slow
def test_counters_of_one_run_in_many_files_are_subtracted(small, tmp_path):
    """LMDeploy's dumps, which do not reset what they count."""
    torch = pytest.importorskip("torch")
    for step, counters in zip(small.steps.tolist(), small.counts.cumsum(axis=0)):
        document = {"counts": torch.tensor(counters), "total_tokens": torch.tensor(counters.sum(1)), "step": step}
        torch.save({**document, "rank": 0}, tmp_path / f"rank0_step{step}_expert_counts.pt")
    paths = list(tmp_path.iterdir())

    with pytest.raises(TraceError, match=r"cumulative.*--difference"):
        read_trace(paths, options=ReadOptions(merge="steps"))
    found = read_trace(paths, options=ReadOptions(merge="steps", difference=True))
    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)


def naive_differences(counters):
    """Step by step and layer by layer, from 0, and from 0 again after a count fell."""
    counts = []
    before = np.zeros_like(counters[0])
    for now in counters:
        counts.append([now[j] if (now[j] < before[j]).any() else now[j] - before[j] for j in range(len(now))])
        before = now
    return np.array(counts)


@pytest.mark.parametrize("resets", [(), (7,), (1, 20, 21)])
def test_counters_become_counts_with_their_resets(tmp_path, resets):
    """A reset is said; the counts are those of a plain loop."""
    counts = large()
    counters = np.concatenate([part.cumsum(axis=0) for part in np.split(counts, resets)])
    pd.DataFrame(
        {"step": range(40), **{f"layer_{j}_expert_{e}": counters[:, j, e] for j, e in np.ndindex(2, 16)}}
    ).to_csv(tmp_path / "dump.csv", index=False)

    found = read_trace(tmp_path / "dump.csv", options=ReadOptions(difference=True))

    assert np.array_equal(naive_differences(counters), found.counts)
    assert np.array_equal(counts, found.counts)
    assert bool(resets) == ("reset" in [finding.name for finding in found.info.findings])
    later = read_trace(tmp_path / "dump.csv", options=ReadOptions(difference=True, first=10))
    assert np.array_equal(counts[10:], later.counts)


@pytest.mark.parametrize(("rows", "resets"), [(5, ()), (19, ()), (40, (12, 25))])
def test_counters_are_told_in_few_rows_and_between_resets(tmp_path, rows, resets):
    """A count of a counter never falls but where all begin anew."""
    parts = np.split(large((rows, 1)), resets)
    np.save(tmp_path / "dump.npy", np.concatenate([part.cumsum(axis=0) for part in parts]))

    with pytest.raises(TraceError, match=r"\(cumulative\); use --difference"):
        read_trace(tmp_path / "dump.npy")


def test_batches_that_grow_now_and_then_are_no_counters(tmp_path):
    """Every count grows with the batch, but not in the steps between."""
    parts = [np.random.default_rng(i).multinomial(2000 * 2**i, [0.4, 0.3, 0.2, 0.1], size=(5, 1)) for i in range(4)]
    np.save(tmp_path / "dump.npy", np.concatenate(parts))

    assert "cumulative" not in [finding.name for finding in read_trace(tmp_path / "dump.npy").info.findings]


def test_a_dense_layer_of_zeros_is_named(small, tmp_path):
    """And following the advice is enough."""
    counts = small.counts.copy()
    counts[:, 0] = 0
    np.save(tmp_path / "dump.npy", counts)

    with pytest.raises(TraceError, match=r"layer 0: the layer has no tokens in any of the first .* steps.*--layers 1$"):
        read_trace(tmp_path / "dump.npy")
    assert np.array_equal(counts[:, 1:], read_trace(tmp_path / "dump.npy", options=ReadOptions(layers=(1,))).counts)


def test_a_file_for_each_step_holds_layers_of_experts(small, tmp_path):
    """Two dimensions are steps and experts only where the name names no step."""
    for step, counts in zip(small.steps, small.counts):
        np.save(tmp_path / f"counts_step{step}.npy", counts)

    found = read_trace(list(tmp_path.iterdir()), options=ReadOptions(merge="steps"))

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)


@pytest.mark.parametrize(
    ("step", "layer"), [("step", "layer"), ("iters", "layer_ids"), ("global_step", "LayerIdx"), ("steps", "layers")]
)
def test_numbers_beside_the_counts_are_known_by_their_names(tmp_path, step, layer):
    """Steps are not counted from 1 where the file has their numbers; which array they were is said."""
    counts = np.full((3, 2, 4), 5)
    np.savez(tmp_path / "x.npz", **{"counts": counts, step: [10, 20, 30], layer: [3, 7]})
    found = read_trace(tmp_path / "x.npz")

    assert ([10, 20, 30], (3, 7)) == (found.steps.tolist(), found.layers)
    assert (step != "steps") == (f"array {step} has the numbers of the steps" in found.info.assumptions)


def test_an_array_of_another_length_numbers_nothing(tmp_path):
    """A single step of a checkpoint beside many logged ones, or a name that is no number."""
    np.savez(tmp_path / "x.npz", counts=np.full((3, 2, 4), 5), step=7)

    assert [1, 2, 3] == read_trace(tmp_path / "x.npz").steps.tolist()
