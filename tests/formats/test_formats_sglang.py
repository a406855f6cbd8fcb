"""SGLang's recorder: buffers, ranks, physical experts, phases, and pickles that are not run."""

import pickle

import numpy as np
import pytest
from dumps import sglang

from moetrace import ReadOptions, TraceError, read_trace

torch = pytest.importorskip("torch")


def names(trace):
    """The names of the findings of a trace."""
    return [found.name for found in trace.info.findings]


def stat(folder, counts):
    """A `stat` dump of counts (passes, layers, experts)."""
    path = folder / "expert_distribution_recorder_1700000000.25.pt"
    torch.save({"rank": 0, "logical_count": torch.tensor(counts, dtype=torch.int32)}, path)
    return path


def test_the_unused_end_of_a_buffer_is_left_out(small, tmp_path):
    """A circular buffer has the size that was set, whatever was recorded."""
    found = read_trace(stat(tmp_path, np.concatenate([small.counts, 0 * small.counts])))

    assert ["padded"] == names(found)
    assert ("step 61", "60 of 120 places of the buffer were not reached") == (
        found.info.findings[0].place,
        found.info.findings[0].evidence,
    )
    assert np.array_equal(small.counts, found.counts)


def test_a_full_buffer_of_the_default_size_may_have_gone_round(tmp_path):
    """1,000 places, all of them used."""
    counts = np.random.default_rng(0).multinomial(100, [0.25] * 4, (1000, 2))

    assert ["wrapped"] == names(read_trace(stat(tmp_path, counts)))
    assert [] == names(read_trace(stat(tmp_path, counts[:999])))


def test_empty_places_between_others_are_a_seam_or_idle_passes(small, tmp_path):
    """They are no steps of their own, but may be added up."""
    counts = small.counts.copy()
    counts[30:33] = 0
    path = stat(tmp_path, counts)

    with pytest.raises(TraceError, match="empty"):
        read_trace(path)
    found = read_trace(path, options=ReadOptions(bin=10))
    assert "wrapped" in names(found)
    assert np.array_equal(counts[:10].sum(axis=0), found.counts[0])


def test_dense_layers_are_left_out_and_named(small, tmp_path):
    """The recorder counts for every layer of the model."""
    found = read_trace(sglang(small, tmp_path))

    assert (3, 5) == found.layers
    assert "layers without any token are dense ones and left out: 0, 1, 2, 4" in found.info.assumptions


def per_pass(folder, small, mapping, modes=None):
    """Two ranks of `per_pass` records of six physical experts."""
    half = np.stack([small.counts // 2, small.counts - small.counts // 2])
    for rank, counts in enumerate(half):
        physical = np.zeros((60, 2, 6), np.int32)
        physical[..., :4] = counts
        physical[..., 4:] = physical[..., :2] // 2  # experts 0 and 1 have a second place
        physical[..., :2] -= physical[..., 4:]
        records = [
            {
                "forward_pass_id": 10 + i,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(physical[i]),
            }
            | ({"forward_mode": modes[i]} if modes else {})
            for i in range(60)
        ]
        document = {"records": records, "last_physical_to_logical_map": mapping}
        torch.save(document, folder / f"expert_distribution_recorder_1700000000.{rank}1_{rank}.pt")
    return folder


MAP = torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)


def test_ranks_of_passes_are_added_up_to_logical_experts(small, tmp_path):
    """Physical experts are replicas of logical ones."""
    found = read_trace(per_pass(tmp_path, small, MAP))

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)
    assert any("last map" in text for text in found.info.assumptions)


def test_physical_experts_without_a_map_are_an_error(small, tmp_path):
    """Their loads say nothing about a logical expert."""
    folder = per_pass(tmp_path, small, None)

    with pytest.raises(TraceError, match=r"physical.*--accept physical"):
        read_trace(folder)
    assert ["physical"] == names(read_trace(folder, options=ReadOptions(accept=("physical",))))


def test_a_phase_is_picked_where_the_dump_tells(small, tmp_path):
    """Mode 1 is prefill, 2 decode; mixed passes are neither."""
    (tmp_path / "tells").mkdir()
    folder = per_pass(tmp_path / "tells", small, MAP, [1, 2, 3] * 20)

    assert small.steps[1::3].tolist() == read_trace(folder, format="sglang:phase=decode").steps.tolist()
    for path in (per_pass(tmp_path, small, MAP), stat(tmp_path, small.counts)):
        with pytest.raises(TraceError, match="does not distinguish prefill from decode"):
            read_trace(path, format=":phase=prefill")


class Hostile:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return (open, ("was-run", "w"))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    """Nothing but tensors and plain containers is built."""
    monkeypatch.chdir(tmp_path)
    torch.save({"logical_count": Hostile()}, tmp_path / "dump.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile()))

    for path in (tmp_path / "dump.pt", tmp_path / "raw.pt"):
        with pytest.raises(TraceError, match=r"holds io.open, which is no tensor|cannot be opened") as caught:
            read_trace(path, format="sglang")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("records", [False, True])
def test_counts_of_bfloat16_are_rounded_ones(tmp_path, records):
    """NumPy has no such type; they are neither multiples nor doubled."""
    torch = pytest.importorskip("torch")
    counts = torch.tensor(np.random.default_rng(0).multinomial(20_000, np.arange(1, 9) / 36, size=(6, 2)) * 4)
    half = counts.to(torch.bfloat16)
    document = {"logical_count": half}
    if records:
        kept = [{"forward_pass_id": i, "rank": 0, "global_physical_count": step} for i, step in enumerate(half)]
        document = {"records": kept, "last_physical_to_logical_map": torch.arange(8).repeat(2, 1)}
    torch.save(document, tmp_path / "dump.pt")

    found = read_trace(tmp_path / "dump.pt")

    assert np.array_equal(half.to(torch.int64).numpy(), found.counts)
    names = [finding.name for finding in found.info.findings]
    assert "rounded" in names
    assert not {"multiplied", "doubled"} & set(names)
