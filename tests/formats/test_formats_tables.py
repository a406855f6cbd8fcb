"""Tables as people export them: trackers of experiments, spreadsheets, lists in cells, columns of other names."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import ReadOptions, SettingError, TraceError, read_trace

TAGS = {
    "layer first": "moe/layer_{layer}/expert_{expert}",
    "expert first": "moe/expert_{expert}/layer_{layer}/tokens",
    "a module": "model.layers.{layer}.mlp.experts.{expert}.tokens",
    "Automodel": "moe_load/layer_{layer}_expert_{expert}",
    "ltp": "moe-expert/tokens_layer{layer}_expert{expert}",
}


def tagged(trace, tag):
    """A row for each step, a column for each layer and expert, named by *tag*."""
    columns = {
        tag.format(layer=layer, expert=expert): trace.counts[:, j, expert]
        for j, layer in enumerate(trace.layers)
        for expert in range(trace.experts)
    }
    return pd.DataFrame({"step": trace.steps, **columns})


def between(frame, step="step"):
    """The same with rows of a loss between, whose other cells are empty, as trackers log them."""
    losses = pd.DataFrame({step: frame[step], "loss": 2.5, "epoch": 0})
    both = pd.concat([losses, frame]).sort_values(step, kind="stable")
    return both.astype({name: "Int64" for name in frame.columns if name != step})


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.slow
def test_columns_named_like_tags_are_experts(small, tmp_path, tag, kind):
    """With rows of other metrics between, whose cells are empty here."""
    frame = between(tagged(small, TAGS[tag]))
    path = tmp_path / f"metrics.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(row.dropna().to_json() + "\n" for _, row in frame.astype(object).iterrows()))

    found = read_trace(path)

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers
    assert any(text.startswith("columns like ") for text in found.info.assumptions)


def test_a_chart_that_was_exported_has_extremes_beside_each_column(small, tmp_path):
    """As the CSV of a chart of Weights & Biases: run - tag, run - tag__MIN, run - tag__MAX."""
    frame = tagged(small, "run-7 - moe/layer_{layer}/expert_{expert}").rename(columns={"step": "Step"})
    for name in list(frame.columns)[1:]:
        frame[f"{name}__MIN"] = frame[f"{name}__MAX"] = frame[name]
    frame.to_csv(tmp_path / "wandb_export.csv", index=False)

    assert np.array_equal(small.counts, read_trace(tmp_path / "wandb_export.csv").counts)


def test_a_history_of_trainer_steps_has_its_own_name_for_them(small, tmp_path):
    """Weights & Biases counts its own steps beside those of the trainer."""
    frame = tagged(small, "layer_{layer}/expert_{expert}").rename(columns={"step": "trainer/global_step"})
    frame.to_csv(tmp_path / "history.csv", index=False)

    assert np.array_equal(small.steps, read_trace(tmp_path / "history.csv").steps)


def test_metrics_by_name_are_matched_as_tags(small, tmp_path):
    """A row for each scalar, its name in the column `key`, as MLflow has them."""
    frame = tagged(small, "moe/layer_{layer}/expert_{expert}").melt("step", var_name="key").sort_values("step")
    other = pd.DataFrame({"step": small.steps, "key": "loss", "value": 2})
    pd.concat([other, frame]).sort_values("step", kind="stable").to_csv(tmp_path / "metrics.csv", index=False)

    assert np.array_equal(small.counts, read_trace(tmp_path / "metrics.csv").counts)


def test_a_pattern_names_layer_and_expert_in_columns(small, tmp_path):
    """The line that says that none fits has one that does."""
    tagged(small, "L{layer}.load.{expert}").to_csv(tmp_path / "metrics.csv", index=False)

    with pytest.raises(TraceError, match=r"L#.load.#") as caught:
        read_trace(tmp_path / "metrics.csv")
    pattern = str(caught.value).partition("--pattern '")[2].rstrip("'")
    found = read_trace(tmp_path / "metrics.csv", format=f":pattern={pattern}")

    assert np.array_equal(small.counts, found.counts)


def test_two_kinds_of_columns_are_a_question(small, tmp_path):
    """Which of them are the counts cannot be told."""
    both = tagged(small, "a/layer_{layer}/expert_{expert}").merge(tagged(small, "b/layer_{layer}/expert_{expert}"))
    both.to_csv(tmp_path / "metrics.csv", index=False)

    with pytest.raises(TraceError, match=r"a/layer_#/expert_# and like b/layer_#.*--pattern"):
        read_trace(tmp_path / "metrics.csv")


@pytest.mark.parametrize("other", ["load", "count", "n_tokens"])
def test_two_columns_of_counts_are_a_question(small, tmp_path, other):
    """Both are named, and --column answers."""
    frame = long_table(small).to_pandas()
    frame[other] = frame["tokens"] // 2
    frame.to_csv(tmp_path / "dump.csv", index=False)

    with pytest.raises(TraceError, match=rf"columns tokens and {other} may be the counts.*--column tokens={other}"):
        read_trace(tmp_path / "dump.csv")
    found = read_trace(tmp_path / "dump.csv", format=f":column=tokens={other}")
    assert np.array_equal(small.counts // 2, found.counts)


@pytest.mark.parametrize("other", ["total_tokens", "token_id_max", "load_time_ms", "capacity", "dropped_tokens"])
def test_sums_and_measures_are_no_counts(small, tmp_path, other):
    """Nothing is asked for what cannot be counts of an expert."""
    frame = long_table(small).to_pandas()
    frame[other] = 7
    frame.to_csv(tmp_path / "dump.csv", index=False)

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.csv").counts)


def test_columns_are_called_what_they_are_by_option(small, tmp_path):
    """Any of them, by their roles; a role or column that is not there is refused."""
    names = {"step": "zeit", "layer": "schicht", "expert": "wer", "tokens": "wieviel"}
    long_table(small).to_pandas().rename(columns=names).to_csv(tmp_path / "dump.csv", index=False)
    spec = ",".join(f"{role}={name}" for role, name in names.items())

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.csv", format=f":column={spec}").counts)
    with pytest.raises(TraceError, match="has no column zeiten"):
        read_trace(tmp_path / "dump.csv", format=":column=step=zeiten")
    with pytest.raises(SettingError, match="--column is role=name"):
        read_trace(tmp_path / "dump.csv", format=":column=colour=red")


@pytest.mark.parametrize("written", [str, lambda counts: str([float(count) for count in counts])])
def test_lists_in_cells_are_read(small, tmp_path, written):
    """As text, as Python writes them."""
    wide = np.repeat(small.counts, 8, axis=2)
    rows = [
        {"step": step, "layer": layer, "expert distribution": written(wide[i, j].tolist())}
        for i, step in enumerate(small.steps)
        for j, layer in enumerate(small.layers)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "dump.csv", index=False)

    assert np.array_equal(wide, read_trace(tmp_path / "dump.csv", options=ReadOptions(accept=("doubled",))).counts)


def test_lists_that_were_shortened_are_refused(tmp_path):
    """NumPy writes dots where it leaves numbers out."""
    pd.DataFrame({"step": [1], "counts": ["[1 2 ... 8 9]"]}).to_csv(tmp_path / "dump.csv", index=False)

    with pytest.raises(TraceError, match=r"row 0: is not a list of numbers: '\[1 2 ... 8 9\]'"):
        read_trace(tmp_path / "dump.csv")


def test_lists_of_lists_are_layers_of_experts(small, tmp_path):
    """All layers of a step in one line."""
    lines = [{"step": int(s), "counts": small.counts[i].tolist()} for i, s in enumerate(small.steps)]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.jsonl").counts)


def test_bare_numbers_are_experts(small, tmp_path):
    """As a pivot table has them."""
    frame = long_table(small).to_pandas().pivot_table(index=["step", "layer"], columns="expert", values="tokens")
    frame.reset_index().to_csv(tmp_path / "dump.csv", index=False)

    found = read_trace(tmp_path / "dump.csv")

    assert np.array_equal(small.counts, found.counts)
    assert "columns with bare numbers are experts" in found.info.assumptions


@pytest.mark.parametrize(
    "name", ["model.layers.{}.mlp", "decoder.block.{}.moe", "h.{}", "L{}", "transformer/h_{}/moe_0"]
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_layers_may_be_named_like_modules(small, tmp_path, name, kind):
    """By the number in the name."""
    frame = long_table(small).to_pandas()
    frame["layer"] = [name.format(layer) for layer in frame["layer"]]
    path = tmp_path / f"dump.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)

    assert small.layers == read_trace(path).layers


def test_thousands_are_set_apart_by_commas(tmp_path):
    """As spreadsheets write them; dots are decimal points, and a count that is not whole is refused."""
    counts = np.array([[[15_000, 987], [1_234_567, 12]], [[15_123, 3], [999, 1_001]]])
    rows = [
        {"step": i + 1, "layer": j, "expert": e, "tokens": f"{counts[i, j, e]:,}"}
        for i, j, e in np.ndindex(counts.shape)
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "commas.csv", index=False)

    assert np.array_equal(counts, read_trace(tmp_path / "commas.csv").counts)
    frame["tokens"] = frame["tokens"].str.replace(",", ".")
    frame.to_csv(tmp_path / "dots.csv", index=False, sep=";")
    with pytest.raises(TraceError, match=r"column tokens: holds text, not numbers; .*docs/recipes.md"):
        read_trace(tmp_path / "dots.csv")


def test_shares_with_three_decimals_stay_shares(tmp_path):
    """0.125 is no number of thousands."""
    (tmp_path / "dump.csv").write_text("step,expert,share\n1,0,0.125\n1,1,0.875\n")

    found = read_trace(tmp_path / "dump.csv", options=ReadOptions(tokens_per_step=8))

    assert [[[1, 7]]] == found.counts.tolist()


def test_counts_of_1_among_others_are_no_shares(tmp_path):
    """Fractional columns are shares only where no number is above 1, though the tokens of a step are known."""
    (tmp_path / "dump.csv").write_text("step,expert,tokens\n1,0,1.0\n1,1,7.0\n")
    (tmp_path / "shares.csv").write_text("step,expert,tokens\n1,0,0.125\n1,1,0.875\n2,0,0.0\n2,1,1.0\n")

    options = ReadOptions(tokens_per_step=8)

    assert [[[1, 7]]] == read_trace(tmp_path / "dump.csv", options=options).counts.tolist()
    assert [[[1, 7]], [[0, 8]]] == read_trace(tmp_path / "shares.csv", options=options).counts.tolist()


def test_percentages_are_shares(tmp_path):
    """Which need the tokens of a step."""
    (tmp_path / "dump.csv").write_text("step,expert,tokens\n1,0,12.5%\n1,1,87.5%\n")

    with pytest.raises(TraceError, match=r"holds shares, not counts.*--tokens-per-step"):
        read_trace(tmp_path / "dump.csv")
    found = read_trace(tmp_path / "dump.csv", options=ReadOptions(tokens_per_step=8))
    assert [[[1, 7]]] == found.counts.tolist()


@pytest.mark.slow
def test_the_step_and_the_layer_may_stand_in_the_name_of_the_file(small, tmp_path):
    """A file for each; without a step in their names files are counted on."""
    frame = long_table(small).to_pandas()
    for step, part in frame.groupby("step"):
        part.drop(columns="step").to_csv(tmp_path / f"load_step{step}.csv", index=False)
        part.drop(columns="step").to_csv(tmp_path / f"counts_{1_700_000_000 + step}.csv", index=False)

    named = read_trace(list(tmp_path.glob("load_step*.csv")), options=ReadOptions(merge="steps"))
    counted = read_trace(list(tmp_path.glob("counts_*.csv")), options=ReadOptions(merge="steps"))

    assert np.array_equal(small.counts, named.counts)
    assert np.array_equal(small.steps, named.steps)
    assert np.array_equal(small.counts, counted.counts)
    assert list(range(1, 61)) == counted.steps.tolist()


def test_files_of_ranks_and_layers_are_added_up_and_put_together(small, tmp_path):
    """A folder for each rank, a file for each layer in it."""
    paths = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for j, layer in enumerate(small.layers):
            paths.append(tmp_path / str(rank) / f"moe_layer-{layer}.parquet")
            lists = [(row // 2 + (row % 2) * rank).tolist() for row in small.counts[:, j]]
            pq.write_table(pa.table({"iteration": small.steps, "counts": lists}), paths[-1])

    found = read_trace(paths, options=ReadOptions(merge="sum"))

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


@pytest.mark.slow
def test_files_of_ranks_and_steps_follow_each_other_within_a_rank(small, tmp_path):
    """Names that tell both need no second merge; as segments of one run they are refused."""
    frame = long_table(small).to_pandas()
    for rank in range(2):
        for step, part in frame.groupby("step"):
            part.drop(columns="step").to_csv(tmp_path / f"rank{rank}_step{step}.csv", index=False)
    paths = list(tmp_path.glob("*.csv"))

    assert np.array_equal(2 * small.counts, read_trace(paths, options=ReadOptions(merge="sum")).counts)
    with pytest.raises(TraceError, match="files of 2 ranks"):
        read_trace(paths, options=ReadOptions(merge="steps"))


def test_a_column_that_is_added_up_is_said(small, tmp_path):
    """And of a plain table it is only said which column has the counts, and how experts are numbered."""
    frame = long_table(small).to_pandas()
    frame.to_csv(tmp_path / "dump.csv", index=False)
    pd.concat([frame.assign(rank=rank) for rank in (0, 1)]).to_csv(tmp_path / "ranks.csv", index=False)

    plain, ranks = (
        read_trace(tmp_path / name, options=ReadOptions(settings=settings))
        for name, settings in (("dump.csv", {}), ("ranks.csv", {"sum_over": "rank"}))
    )

    assert 2 == len(plain.info.assumptions)
    assert {"counts are added up over rank"} == {*ranks.info.assumptions} - {*plain.info.assumptions}
    assert np.array_equal(2 * plain.counts, ranks.counts)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_last_line_that_was_cut_off_is_left_out_with_its_step(small, tmp_path, kind):
    """As a kill leaves it; both are said."""
    path = tmp_path / f"dump.{kind}"
    frame = long_table(small).to_pandas()
    text = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", lines=True)
    path.write_text(text.rstrip()[:-4])

    found = read_trace(path)

    assert np.array_equal(small.counts[:-1], found.counts)
    assert ["cut", "unfinished"] == [finding.name for finding in found.info.findings]


LINES = {
    "experts as keys": lambda s, j, c: {"step": s, "layer": j, "counts": dict(enumerate(c))},
    "named experts": lambda s, j, c: {"iteration": s, "layer": j, "load": {f"expert_{e}": n for e, n in enumerate(c)}},
}
STEPS = {
    "layers as keys": lambda s, c: {"step": s, "layers": {f"model.layers.{j}.mlp": e for j, e in c.items()}},
    "a list for each layer": lambda s, c: {"step": s, "loss": 1.5, **{f"layer_{j}": e for j, e in c.items()}},
    "layers of experts": lambda s, c: {"step": s, "counts": {j: dict(enumerate(e)) for j, e in c.items()}},
}


@pytest.mark.parametrize("form", [*LINES, *STEPS])
def test_lines_of_json_may_have_keys_for_layers_and_experts(small, tmp_path, form):
    """Each line a step, or a step and layer; also where the file is called .json."""
    by_step = [
        (step, {j: small.counts[i, k].tolist() for k, j in enumerate(small.layers)})
        for i, step in enumerate(small.steps.tolist())
    ]
    if form in LINES:
        rows = [LINES[form](step, j, c) for step, layers in by_step for j, c in layers.items()]
    else:
        rows = [STEPS[form](step, layers) for step, layers in by_step]
    for name in ("dump.jsonl", "lines.json"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

        found = read_trace(tmp_path / name)

        assert np.array_equal(small.counts, found.counts)
        assert small.layers == found.layers
        assert "jsonl" == found.info.format


def test_counters_in_lines_leave_idle_experts_out(tmp_path):
    """And are filled by option."""
    lines = [{"step": 1, "layer": 0, "counts": {"0": 3, "2": 4}}, {"step": 2, "layer": 0, "counts": {"1": 5}}]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(TraceError, match="--idle-experts"):
        read_trace(tmp_path / "dump.jsonl")
    found = read_trace(tmp_path / "dump.jsonl", options=ReadOptions(idle_experts=True))
    assert [[[3, 0, 4]], [[0, 5, 0]]] == found.counts.tolist()


@pytest.mark.parametrize("name", ["tokens_expert_{}", "expert {}", "Expert.{}", "e{}"])
def test_columns_of_experts_need_no_layer_in_their_names(small, tmp_path, name):
    """Each row names its layer."""
    frame = long_table(small).to_pandas().pivot_table(index=["step", "layer"], columns="expert", values="tokens")
    frame.columns = [name.format(expert) for expert in frame.columns]
    frame.reset_index().assign(tokens=100).to_csv(tmp_path / "dump.csv", index=False)

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.csv").counts)


def test_steps_and_experts_may_be_named(small, tmp_path):
    """By a word and their number."""
    frame = long_table(small).to_pandas()
    frame["step"] = "step " + frame["step"].astype(str)
    frame["expert"] = "expert_" + frame["expert"].astype(str)
    frame.to_csv(tmp_path / "dump.csv", index=False)

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.csv").counts)


def test_a_comma_may_be_the_decimal_point(tmp_path):
    """Where what follows is no group of three digits."""
    (tmp_path / "dump.csv").write_text("step;expert;share\n1;0;0,125\n1;1;0,875\n2;0;0,5\n2;1;0,5\n")

    found = read_trace(tmp_path / "dump.csv", options=ReadOptions(tokens_per_step=8))

    assert [[[1, 7]], [[4, 4]]] == found.counts.tolist()


def test_two_lists_in_lines_are_a_question(tmp_path):
    """Also where lines may have lists of layers."""
    lines = [{"step": 1, "layer": 0, "tokens": [1, 2], "counts": [2, 4]}]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(TraceError, match="columns tokens and counts may be the counts"):
        read_trace(tmp_path / "dump.jsonl")


@pytest.mark.parametrize(
    ("step", "layer", "expert"),
    [
        ("Global Step", "MoE layer idx", "Expert #"),
        ("train/global_step", "layer_num", "expert_no"),
        ("trainer/global_step", "moe_layer_id", "ExpertNumber"),
    ],
)
def test_columns_are_known_by_the_names_that_people_give_them(small, tmp_path, step, layer, expert):
    """Also beside the index that pandas writes as a column without a name."""
    frame = long_table(small).to_pandas().rename(columns={"step": step, "layer": layer, "expert": expert})
    frame.to_csv(tmp_path / "x.csv")

    assert np.array_equal(small.counts, read_trace(tmp_path / "x.csv").counts)


def test_one_of_a_kind_is_one(tmp_path):
    """What is assumed reads as English for a single step, layer or expert, too."""
    np.save(tmp_path / "x.npy", np.full((1, 1, 8), 5))

    assert "1 step x 1 layer x 8 experts" in read_trace(tmp_path / "x.npy").info.assumptions[-1]


def test_a_negative_number_as_text_keeps_its_sign(tmp_path):
    """It is no expert, and not the one of the same digits."""
    rows = [{"step": 1, "expert": expert, "tokens": 5} for expert in ("0", "1", "-1")]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(TraceError, match="an expert has a negative number"):
        read_trace(tmp_path / "log.jsonl")


def test_columns_of_experts_with_and_without_a_layer_are_refused(tmp_path):
    """Nobody knows which layer the latter are of."""
    (tmp_path / "log.csv").write_text("step,layer_0_expert_0,layer_0_expert_1,expert_2\n1,5,5,5\n")

    with pytest.raises(TraceError, match="has tags like expert_# and like layer_#_expert_#"):
        read_trace(tmp_path / "log.csv")


def test_of_two_columns_of_steps_the_other_is_named(small, tmp_path):
    """As left out, so that whoever meant that one sees it."""
    table = long_table(small).to_pandas()
    table.assign(global_step=2 * table["step"]).to_csv(tmp_path / "log.csv", index=False)

    found = read_trace(tmp_path / "log.csv")

    assert np.array_equal(small.steps, found.steps)
    assert "column global_step is left out, since step is the step" in found.info.assumptions
