"""Choices of single tokens: padding, experts chosen twice, shared experts, and the forms that logs of them have."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrace import ReadOptions, SettingError, TraceError, read_trace
from moetrace.formats import Query
from moetrace.formats.stream.choices import Census, Choices

IDLE = ReadOptions(idle_experts=True)


def chosen(tokens=256, layers=2, experts=16, k=4):
    """Choices (tokens, layers, k), none twice in a token, lower experts more often."""
    rng = np.random.default_rng(0)
    return (rng.gumbel(size=(tokens, layers, experts)) - np.log1p(np.arange(experts))).argsort(axis=2)[..., -k:]


def naive(choices, tokens, experts=16):
    """Counted in plain loops; what is below 0 is none."""
    counts = np.zeros((-(-len(choices) // tokens), choices.shape[1], experts), int)
    for i, layer, k in np.ndindex(choices.shape):
        if choices[i, layer, k] >= 0:
            counts[i // tokens, layer, choices[i, layer, k]] += 1
    return counts


def read(array, folder, name="routed_experts", **options):
    """The trace of an array of choices."""
    np.save(folder / f"{name}.npy", array)
    options.setdefault("tokens", 64)
    spec = options.pop("format", None)
    return read_trace(folder / f"{name}.npy", options=ReadOptions(**options), format=spec)


def names(trace):
    return [finding.name for finding in trace.info.findings]


@pytest.mark.parametrize("kind", [np.int16, np.int64])
def test_places_without_a_choice_are_left_out(tmp_path, kind):
    """-1 stands for no choice."""
    choices = chosen()
    choices[200:] = -1

    assert np.array_equal(naive(choices, 64), read(choices.astype(kind), tmp_path).counts)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_padding_in_an_unsigned_array_is_a_question(tmp_path, kind):
    """-1 became the highest number of its type, and the answer that is offered leaves it out."""
    choices = chosen()
    choices[200:] = -1
    highest = min(np.iinfo(kind).max, np.iinfo(np.int64).max)

    with pytest.raises(
        TraceError, match=rf"expert {highest} is far beyond.*padding; leave it out with --ignore {highest}"
    ):
        read(choices.astype(kind), tmp_path)
    found = read(choices.astype(kind), tmp_path, format=f":ignore={highest}")
    assert np.array_equal(naive(choices, 64), found.counts)


def test_the_highest_number_of_a_type_is_a_question_near_others_too(tmp_path):
    """255 after 199 is no further than other gaps between experts."""
    choices = np.arange(200).repeat(4).reshape(200, 1, 4)[:, :, [0]].astype(np.uint8)
    choices[7] = 255

    with pytest.raises(TraceError, match="expert 255 is far beyond all others, which end with 199"):
        read(choices, tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_padding_in_tables_is_left_out(tmp_path, kind):
    """255 far from all others."""
    choices = chosen(layers=1)[:, 0]
    choices[200:] = 255
    path = tmp_path / f"dump.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"topk_ids": pa.array(choices.tolist(), pa.list_(pa.uint8()))}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"topk_ids": row}) + "\n" for row in choices.tolist()))
    else:
        rows = {"token": range(256), "topk_ids": [str(row) for row in choices.tolist()]}
        pd.DataFrame(rows).to_csv(path, index=False)

    found = read_trace(path, options=ReadOptions(tokens=64), format=":ignore=255")

    expected = naive(np.where(choices == 255, -1, choices)[:, None], 64)
    assert np.array_equal(expected, found.counts)


def test_the_highest_number_is_an_expert_where_that_is_said(tmp_path):
    """--experts 256 makes 255 one."""
    choices = chosen()
    choices[0, 0, 0] = 255

    found = read(choices.astype(np.uint8), tmp_path, experts=256)

    assert 256 == found.experts
    assert 1 == found.counts[..., 255].sum()


def test_an_expert_far_from_all_others_is_a_question(tmp_path):
    """Both answers work."""
    choices = chosen()
    choices[0, 0, 0] = 999

    with pytest.raises(TraceError, match=r"expert 999 is far beyond.*--ignore 999.*--experts N"):
        read(choices, tmp_path)
    assert 1000 == read(choices, tmp_path, experts=1000).experts
    assert 16 == read(choices, tmp_path, format=":ignore=999").experts


def test_rows_of_zeros_are_found_and_left_out_by_option(tmp_path):
    """How many and where is said; taking them as they are is possible."""
    choices = chosen()
    choices[192:] = 0

    said = r"in layers 0, 1 128 of 512 tokens choose one expert twice, 128 of them 0 alone.*--ignore N"
    with pytest.raises(TraceError, match=said):
        read(choices, tmp_path)
    found = read(choices, tmp_path, format=":ignore=0")
    assert "tokens that choose 0 alone are left out, by --ignore" in found.info.assumptions
    accepted = read(choices, tmp_path, accept=("repeated-choice",))

    assert np.array_equal(naive(choices[:192], 64), found.counts)
    assert [] == names(found)
    assert np.array_equal(naive(choices, 64), accepted.counts)
    assert ["repeated-choice"] == names(accepted)


def test_experts_chosen_twice_are_counted_over_all_parts_of_a_log():
    """However it is cut into pieces."""
    twice, once = np.array([[2, 2], [0, 1], [3, 3]]), np.array([[0, 1], [1, 2]])
    pieces = [Choices(None, np.full(len(rows), 7), rows) for rows in (twice, once, twice)]

    (found,) = Census.of(iter(pieces), "log").findings([7])

    assert "in layers 7 4 of 8 tokens choose one expert twice" == found.evidence


def test_a_token_that_chooses_expert_0_among_others_keeps_it(tmp_path):
    """Only rows of it alone are padding."""
    choices = chosen()
    choices[-1] = 0

    found = read(choices, tmp_path, format=":ignore=0")

    assert np.array_equal(naive(choices[:-1], 64), found.counts)


def test_an_expert_chosen_twice_is_found_without_padding_too(tmp_path):
    """As routing by a hash does; of the layers that are taken alone."""
    choices = chosen()
    choices[5, 1, 0] = choices[5, 1, 1]

    with pytest.raises(TraceError, match=r"layer 1: in layers 1 1 of 256 tokens.*--accept repeated-choice"):
        read(choices, tmp_path)
    assert [] == names(read(choices, tmp_path, layers=(0,)))


def test_a_layer_of_one_expert_is_named(tmp_path):
    """A dense layer, whose choices were filled with zeros."""
    choices = chosen(k=1)
    choices[:, 0] = 0

    found = read(choices, tmp_path)

    assert "one-expert" in names(found)
    assert "every choice in layers 0 is expert 0" in found.info.findings[0].evidence
    assert "one-expert" not in names(read(choices, tmp_path, layers=(1,)))
    assert "one-expert" not in names(read(choices[:1], tmp_path, tokens=1))  # one token has one choice


def test_a_fused_shared_expert_is_named_and_left_out_by_option(tmp_path):
    """It is one more id, which every token has."""
    choices = np.concatenate([chosen(), np.full((256, 2, 1), 16)], axis=2)

    found = read(choices, tmp_path)
    without = read(choices, tmp_path, format=":ignore=16")

    assert ["every-token"] == names(found)
    assert np.array_equal(naive(chosen(), 64), without.counts)
    assert [] == names(without)
    assert "16 is left out, 512 times, by --ignore" in without.info.assumptions


def test_a_few_tokens_have_no_shared_expert(tmp_path):
    """31 tokens may all have chosen the last expert; of 32 somebody is to know."""
    for tokens, found in ((31, []), (32, ["every-token"])):
        choices = np.array([[[i % 4, 4]] for i in range(tokens)])
        assert found == names(read(choices, tmp_path, tokens=tokens, idle_experts=True))


def test_more_numbers_than_any_model_has_experts_are_refused(tmp_path, monkeypatch):
    """They are in another column; as many as the limit are read."""
    monkeypatch.setattr("moetrace.formats.stream.choices.MOST_EXPERTS", 16)

    assert 16 == read(np.arange(16).reshape(4, 1, 4), tmp_path, tokens=4).experts
    with pytest.raises(TraceError, match="chooses over 16 different experts; is it the right column"):
        read(np.arange(17).reshape(17, 1, 1), tmp_path, tokens=17, top_k=1)


def test_clean_choices_have_no_finding(tmp_path):
    """Whatever k is."""
    for k in (1, 2, 8):
        assert [] == names(read(chosen(k=k), tmp_path))


def test_what_is_not_there_cannot_be_ignored(tmp_path):
    """An option without effect is a mistake."""
    with pytest.raises(SettingError, match="has no use for --ignore"):
        read(chosen(), tmp_path, format=":ignore=77")


def test_one_expert_for_each_token_and_layer_is_a_question_until_said(tmp_path):
    """(tokens, layers) looks like (steps, experts); the line says what to give, and that works."""
    choices = chosen(layers=6, k=1)[..., 0]

    for name in ("16", "routed_experts"):
        with pytest.raises(TraceError, match="--top-k 1 for one expert") if name == "16" else pytest.raises(TraceError):
            read(choices, tmp_path, name)
        found = read(choices, tmp_path, name, top_k=1)
        assert np.array_equal(naive(choices[..., None], 64), found.counts)
        assert "axes are tokens, layers: 256 x 6" in found.info.assumptions
    with pytest.raises(TraceError, match="--tokens N"):
        read(choices, tmp_path, "16", top_k=1, tokens=None)


def test_counts_of_one_layer_are_no_choices(small, tmp_path):
    """Tokens of steps add up to about the same."""
    counts = np.random.default_rng(0).multinomial(60, [0.4, 0.3, 0.2, 0.1], size=200)
    np.save(tmp_path / "dump.npy", counts)

    found = read_trace(tmp_path / "dump.npy")

    assert "numpy" == found.info.format
    assert np.array_equal(counts, found.counts[:, 0])


def rows_of(choices, step=None):
    """A row for each choice of a token."""
    return pd.DataFrame(
        [
            {
                **({} if step is None else {"step": 1 + i // step}),
                "token": i,
                "layer": layer,
                "expert": choices[i, layer, k],
            }
            for i, layer, k in np.ndindex(choices.shape)
        ]
    )


def test_a_row_for_each_choice_is_counted(tmp_path):
    """With steps, or with the tokens of one and how many each chooses."""
    choices = chosen()
    expected = naive(choices, 64)
    rows_of(choices, 64).to_csv(tmp_path / "steps.csv", index=False)
    rows_of(choices).drop(columns="token").to_csv(tmp_path / "tokens.csv", index=False)

    assert np.array_equal(expected, read_trace(tmp_path / "steps.csv").counts)
    with pytest.raises(TraceError, match="--top-k K"):
        read_trace(tmp_path / "tokens.csv", options=ReadOptions(tokens=64))
    found = read_trace(tmp_path / "tokens.csv", options=ReadOptions(tokens=64, top_k=4))
    assert np.array_equal(expected, found.counts)
    with pytest.raises(SettingError, match="names its steps"):
        read_trace(tmp_path / "steps.csv", options=ReadOptions(tokens=64))


def test_a_damaged_page_of_choices_is_refused(tmp_path):
    """Where the pages have checksums, as a flipped bit is another expert."""
    table = pa.table({"step": np.repeat([1, 2], 50), "topk_ids": np.arange(200).reshape(100, 2).tolist()})
    pq.write_table(table, tmp_path / "d.parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    data = (tmp_path / "d.parquet").read_bytes()
    place = data.index(np.arange(100, 108).tobytes())
    (tmp_path / "d.parquet").write_bytes(data[:place] + b"\x07" + data[place + 1 :])

    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "d.parquet")


@pytest.mark.parametrize("column", ["topk_{}", "expert_{}", "choice{}"])
def test_choices_may_lie_side_by_side(tmp_path, column):
    """A column for each of the k."""
    choices = chosen(layers=1)[:, 0]
    frame = pd.DataFrame(choices, columns=[column.format(k) for k in range(4)])
    frame.insert(0, "token", range(len(frame)))
    frame.to_csv(tmp_path / "dump.csv", index=False)

    found = read_trace(tmp_path / "dump.csv", options=ReadOptions(tokens=64))

    assert np.array_equal(naive(choices[:, None], 64), found.counts)
    assert 4 == found.info.top_k


def test_an_array_of_choices_without_a_name_is_a_question(tmp_path):
    """Counts add up to the same in all layers of a step; both answers work."""
    choices = chosen()

    with pytest.raises(TraceError, match=r"may be experts that were chosen.*--tokens N.*--from numpy"):
        read(choices, tmp_path, "dump", tokens=None)
    assert np.array_equal(naive(choices, 64), read(choices, tmp_path, "dump").counts)
    counts = read(choices, tmp_path, "dump", tokens=None, format="numpy", accept=("empty", "smoothed"))
    assert 4 == counts.experts


def test_passes_of_any_size_are_no_choices(tmp_path):
    """A server routes as many tokens in all layers of a pass, and other numbers in the next."""
    sizes = np.random.default_rng(0).integers(1, 300, 200)
    counts = np.stack([np.random.default_rng(1).multinomial(sizes, [0.4, 0.3, 0.2, 0.1]) for _ in range(3)], axis=1)
    np.save(tmp_path / "dump.npy", counts)

    assert np.array_equal(counts, read_trace(tmp_path / "dump.npy").counts)


def test_choices_may_lie_in_an_archive(tmp_path):
    """Under their usual names."""
    np.savez(tmp_path / "dump.npz", routed_experts=chosen(), input_ids=np.arange(256))

    assert np.array_equal(naive(chosen(), 64), read_trace(tmp_path / "dump.npz", options=ReadOptions(tokens=64)).counts)


def test_columns_that_are_the_layers_of_a_token_go_with_sql(tmp_path):
    """One expert in each, as the changelog says."""
    choices = chosen(layers=3, k=1)[..., 0]
    frame = pd.DataFrame(choices, columns=[f"layer_{j + 2}" for j in range(3)])
    frame.insert(0, "token", range(len(frame)))
    frame.to_csv(tmp_path / "dump.csv", index=False)
    rows = f"UNPIVOT '{tmp_path}/dump.csv' ON COLUMNS('layer_.*') INTO NAME layer VALUE expert"
    columns = "token // 64 + 1 AS step, layer, expert, count(*) AS tokens"

    found = read_trace(Query(f"SELECT {columns} FROM ({rows}) GROUP BY ALL ORDER BY step"), options=IDLE)

    assert np.array_equal(naive(choices[..., None], 64), found.counts)
    assert (2, 3, 4) == found.layers


def test_rows_that_are_said_to_be_choices_are_counted(tmp_path):
    """As the line says that refuses them for want of counts."""
    rows_of(chosen(), 64).drop(columns="token").to_csv(tmp_path / "dump.csv", index=False)

    with pytest.raises(TraceError, match="--from routing"):
        read_trace(tmp_path / "dump.csv")
    assert np.array_equal(naive(chosen(), 64), read_trace(tmp_path / "dump.csv", format="routing").counts)
