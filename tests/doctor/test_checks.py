"""The trace doctor: for each finding the smallest input that triggers it, and clean traces that do not."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE, long_table

from moetrace import ReadOptions, TraceError, examine, read_trace
from moetrace.doctor import ERROR, KINDS, Collector, Factor, failing, gap_findings, totals_findings
from moetrace.synthetic import Course, synthetic_trace

ACCEPT_ALL = tuple(KINDS)


def drawn(*shares, steps=60, tokens=100, layers=1, seed=1):
    """Counts of *tokens* drawn in each step and layer."""
    return np.random.default_rng(seed).multinomial(tokens, shares, (steps, layers))


def array(counts, folder, **options):
    """The trace of an .npy file of counts, every finding accepted."""
    np.save(folder / "dump.npy", counts)
    return read_trace(folder / "dump.npy", options=ReadOptions(accept=ACCEPT_ALL, **options))


def table(rows, folder, **columns):
    """The trace of a long Parquet file of rows (step, layer, expert, tokens), every finding accepted."""
    step, layer, expert, tokens = (list(part) for part in zip(*rows))
    names = {"step": step, "layer": layer, "expert": expert, "tokens": tokens}
    pq.write_table(
        pa.table({columns.get(name, name): values for name, values in names.items()}), folder / "dump.parquet"
    )
    return read_trace(folder / "dump.parquet", options=ReadOptions(accept=ACCEPT_ALL))


def steps_of(*steps):
    """One layer of two experts at those steps."""
    return [(step, 0, expert, 3 + expert) for step in steps for expert in range(2)]


def dump(document, folder):
    """The trace of a dump of SGLang's recorder."""
    torch = pytest.importorskip("torch")
    torch.save({key: torch.tensor(value) for key, value in document.items()}, folder / "dump.pt")
    return read_trace(folder / "dump.pt", options=ReadOptions(accept=ACCEPT_ALL))


def choices(ids, folder, **options):
    """The trace of an .npy file of choices, every finding accepted."""
    np.save(folder / "topk_ids.npy", ids)
    options = ReadOptions(accept=ACCEPT_ALL, tokens=len(ids), **options)
    return read_trace(folder / "topk_ids.npy", options=options)


def bfloat16(counts):
    """Counts as they come back from a tensor of bfloat16."""
    bits = counts.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(np.int64)


def cut(folder):
    """JSON lines whose last one ends in the middle."""
    lines = ['{"step": 1, "counts": [1, 2]}', '{"step": 2, "counts": [3, 4]}', '{"step": 3, "coun']
    (folder / "dump.jsonl").write_text("\n".join(lines))
    return read_trace(folder / "dump.jsonl")


def idle(folder):
    """Two replicas, one of which has no second step."""
    for rank, steps in enumerate(((1, 2, 3), (1, 3))):
        pq.write_table(pa.table({"step": steps, "counts": [[3, 4]] * len(steps)}), folder / f"rank{rank}.parquet")
    options = ReadOptions(merge="sum", idle_experts=True)
    return read_trace(sorted(folder.glob("*.parquet")), options=options)


def with_float32(folder):
    """One float32 count of 2^24, where the next whole number cannot be told apart."""
    pq.write_table(
        pa.table({"step": [1], "counts": pa.array([[2.0**24, 1.0]], pa.list_(pa.float32()))}), folder / "d.parquet"
    )
    return read_trace(folder / "d.parquet")


TRIGGERS = {
    "restart": lambda folder: table(steps_of(1, 2, 3, 2, 3), folder),
    "repeated": lambda folder: table(steps_of(1, 2, 1, 2), folder),
    "gap": lambda folder: table(steps_of(1, 2, 5), folder),
    "part": lambda folder: array([[[3, 4, 0, 0, 0, 0, 0, 0]]], folder),
    "empty": lambda folder: array([[[1, 2]], [[0, 0]]], folder),
    "incomplete": lambda folder: table([(1, 0, 0, 5), (1, 1, 0, 5), (2, 0, 0, 5), (3, 0, 0, 5), (3, 1, 0, 5)], folder),
    "unfinished": lambda folder: table([(1, 0, 0, 5), (1, 1, 0, 5), (2, 0, 0, 5)], folder),
    "cut": cut,
    "idle": idle,
    "reset": lambda folder: array([[[1, 2]], [[2, 4]], [[1, 1]]], folder, difference=True),
    "rounded": lambda folder: array(bfloat16(drawn(*np.arange(1, 33) / 528, tokens=40_000, steps=2)), folder),
    "repeated-choice": lambda folder: choices([[0, 1], [2, 2]], folder),
    "one-expert": lambda folder: choices([[[0], [0]], [[0], [1]]], folder),
    "every-token": lambda folder: choices([[i % 4, 4] for i in range(32)], folder),
    "padded": lambda folder: dump({"logical_count": [[[1, 2]], [[0, 0]]]}, folder),
    "wrapped": lambda folder: dump({"logical_count": [[[1, 2]], [[0, 0]], [[2, 1]]]}, folder),
    "smoothed": lambda folder: array(np.cumsum(drawn(0.5, 0.5, steps=80), axis=0)[20:] - np.cumsum(drawn(0.5, 0.5, steps=80), axis=0)[:60], folder),
    "cumulative": lambda folder: array(np.cumsum(drawn(0.5, 0.5, steps=20), axis=0), folder),
    "physical": lambda folder: table(steps_of(1), folder, tokens="global_physical_count"),
    "float32": with_float32,
    "tokens-differ": lambda folder: array([[[1, 2]]], folder, tokens=3, top_k=2),
    "doubled": lambda folder: array([[[1, 2], [3, 3]], [[4, 1], [5, 5]]], folder),
    "multiplied": lambda folder: array(4 * drawn(0.5, 0.5, steps=16), folder),
    "batch-change": lambda folder: array([[[40, 60]]] * 5 + [[[90, 60]]] * 5, folder),
    "tokens-vary": lambda folder: array([[[1, 2]], [[2, 2]]], folder),
    "dead": lambda folder: array([[[1, 0]]], folder),
    "collapse": lambda folder: array([[[91, 4, 5]]], folder),
    "imbalance": lambda folder: array([[[45, *[5] * 11]]], folder),
    "drift": lambda folder: array(np.concatenate([drawn(0.5, 0.5, steps=1000), drawn(0.6, 0.4, steps=1000)]), folder),
}  # fmt: skip


def test_every_finding_of_the_catalogue_has_a_trigger():
    """A finding that nothing triggers is not tested."""
    assert sorted(KINDS) == sorted(TRIGGERS)


@pytest.mark.parametrize("name", TRIGGERS)
def test_the_smallest_trigger_makes_the_finding(tmp_path, name):
    """With the severity and the advice of the catalogue, a place and evidence."""
    trace = TRIGGERS[name](tmp_path)

    (finding,) = [found for found in examine(trace) if found.name == name]

    assert (KINDS[name].severity, KINDS[name].advice) == (finding.severity, finding.advice)
    assert finding.place
    assert finding.evidence


@pytest.mark.parametrize(
    ("name", "place", "evidence"),
    [
        ("batch-change", "step 6", "tokens per step go from 100 to 150"),
        ("tokens-vary", "the whole trace", "tokens per step and layer go from 3 to 4"),
        ("tokens-differ", "step 1, layer 0", "3 tokens where 6 were expected; so it is in 1 of 1 totals"),
        ("doubled", "layer 1", "the totals of layers 1 are twice those of the others in every step"),
        ("multiplied", "the whole trace", "every one of 32 counts is a multiple of 4"),
        ("dead", "layer 0", "no token in the last 1000 steps for experts 1"),
        ("collapse", "layer 0", "expert 0 has 91% of the load of the last 1000 steps, 2.7x the mean, and 48% of the experts are in use"),
        ("drift", "layer 0", "the shares of the last 1000 steps differ by 20% from those of the 1000 before"),
    ],
)  # fmt: skip
def test_the_evidence_says_what_was_found_and_where(tmp_path, name, place, evidence):
    """With the numbers that anyone can check."""
    (found,) = [found for found in examine(TRIGGERS[name](tmp_path)) if found.name == name]

    assert (place, evidence) == (found.place, found.evidence)


def test_levels_of_tokens_last_for_five_steps():
    """On both sides, and are a fifth apart; a batch size that changes all the time has none."""

    def changes(*totals):
        found = totals_findings(np.array(totals)[:, None], np.arange(1, len(totals) + 1), [0])
        return [(own.name, own.place) for own in found]

    assert [("batch-change", "step 6")] == changes(*[100] * 5, *[120] * 5)
    assert [("batch-change", "step 6")] == changes(*[120] * 5, *[100] * 5)
    assert [("batch-change", "step 6"), ("batch-change", "step 11")] == changes(*[100] * 5, *[150] * 5, *[90] * 5)
    varying = [("tokens-vary", "the whole trace")]
    assert varying == changes(*[100] * 5, *[119] * 5) == changes(*[100] * 4, *[150] * 6) == changes(100, 150, 90, 140)


def test_counts_with_a_factor_are_doubled_or_multiplied():
    """32 counts tell; a factor of 1 is none."""
    found = [
        [own.name for own in Factor(*case, bits=65).findings] for case in ((2, 32), (3, 32), (2, 31), (1, 99), (0, 99))
    ]

    assert [["doubled"], ["multiplied"], [], [], []] == found


@pytest.mark.parametrize(("factor", "bits"), [(1, 10), (4, 12)])
def test_counts_that_half_precision_cannot_hold_are_rounded(factor, bits):
    """The first that bfloat16 with its 8 bits rounds have 10; of four replicas of a token each count is four times so."""
    shorter, longer, few = (np.bincount([at] * n, minlength=65) for at, n in ((bits - 1, 32), (bits, 32), (bits, 31)))

    assert [] == Factor(factor, 0, 8, shorter).findings == Factor(factor, 0, 8, few).findings
    (found,) = Factor(factor, 0, 8, longer).findings
    assert f"32 counts of {2 ** (bits - 1):,} and more were rounded" in found.evidence
    assert [] == Factor(3 * factor, 0, 8, longer).findings


def test_what_a_stream_shows_is_counted(tmp_path):
    """The first place of each finding, and how often it came up, also of several streams together."""
    one, other = Collector(), Collector()
    one.note_half(np.array([1.0, 300.0, 301.0]), 256, "bfloat16", "tokens", 7)
    other.check_precision(np.array([1, 2049, 4096], np.float16), "tokens", 0)
    other.check_precision(np.array([1, 2**24], np.float32), "tokens", 5)
    one.merge(other)

    assert [
        ("rounded", "column tokens, row 8", "a bfloat16 count above 256 is rounded, and lost tokens; and 2 more"),
        ("float32", "column tokens, row 6", "a float32 count beyond 2^24 no longer counts every token"),
    ] == [(found.name, found.place, found.evidence) for found in one.findings]
    assert () == other.findings


# An error of the router, not of the log: the trace is read, and `check` fails.
OF_THE_MODEL = {"collapse"}


@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if kind.severity == ERROR and name not in OF_THE_MODEL]
)
def test_an_error_stops_the_reading_until_it_is_accepted(tmp_path, name, monkeypatch):
    """Nothing wrong is taken in silence."""
    monkeypatch.setitem(globals(), "ACCEPT_ALL", ())

    with pytest.raises(TraceError, match=rf"\({name}\).*--accept {name}"):
        TRIGGERS[name](tmp_path)


CLEAN = {
    "uniform": lambda: drawn(*[1 / 8] * 8, steps=2000, layers=2),
    "skewed": lambda: drawn(0.6, 0.3, 0.05, 0.05, steps=2000, tokens=5000),
    "nearly dominated": lambda: drawn(0.78, 0.11, 0.11, steps=200, tokens=1000),
    "few tokens": lambda: drawn(0.5, 0.5, steps=500, tokens=9),
    "the same in every step": lambda: np.tile([[[5, 7, 4, 9]]], (100, 1, 1)),
    "topics": lambda: (
        synthetic_trace([Course(steps=2000, experts=16, concentration=500, changes=((1, 0.001),))]).counts
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_trace_has_no_finding(tmp_path, name):
    """From its rows to its counts."""
    np.save(tmp_path / "dump.npy", CLEAN[name]())

    assert [] == examine(read_trace(tmp_path / "dump.npy"))


def test_the_sample_trace_has_no_error():
    """A real training run: the load moves, and nothing is wrong with the log."""
    assert [] == [found for found in examine(read_trace(SAMPLE)) if found.severity == ERROR]


def test_one_expert_with_all_tokens_is_collapsed_and_not_smoothed(tmp_path):
    """The noise of a share near 1 is small, and rightly so."""
    trace = array(drawn(0.97, 0.02, 0.01, steps=100, tokens=10_000), tmp_path)

    assert ["collapse"] == [found.name for found in examine(trace)]


def test_a_moving_average_is_smoothed(tmp_path):
    """Weight 0.1 for the new step, as balancers keep it."""
    counts = drawn(0.4, 0.3, 0.2, 0.1, steps=200, tokens=100_000).astype(float)
    for i in range(1, len(counts)):
        counts[i] = 0.9 * counts[i - 1] + 0.1 * counts[i]

    trace = array(np.rint(counts).astype(int), tmp_path)

    assert "smoothed" in [found.name for found in examine(trace)]


def test_a_finding_of_the_reader_is_not_made_again(small, tmp_path):
    """What is in the metadata is shown once."""
    pq.write_table(long_table(small.select(last=40)), tmp_path / "dump.parquet")
    trace = array([[[1, 2]], [[2, 2]]], tmp_path)

    assert ["tokens-vary"] == [found.name for found in examine(trace)]


def test_accepted_errors_do_not_fail_a_check(tmp_path):
    """Whoever accepted them knows."""
    trace = array(np.cumsum(drawn(0.5, 0.5, steps=20), axis=0), tmp_path)
    findings = examine(trace)

    accepted = replace(trace, info=replace(trace.info, settings={"accept": ["cumulative"]}))

    assert ["cumulative"] == [found.name for found in failing(findings, trace)]
    assert [] == failing(findings, accepted)
    assert ["cumulative"] == [found.name for found in failing(findings, accepted, ("cumulative", "gap"))]


@pytest.mark.slow
def test_check_fails_for_what_is_named(moetrace, tmp_path):
    """For watch-dogs and CI."""
    np.save(tmp_path / "run.npy", drawn(0.95, 0.03, 0.02, steps=100))
    moetrace("ingest", tmp_path / "run.npy")

    assert 1 == moetrace("check").code
    np.save(tmp_path / "even.npy", drawn(*[1 / 8] * 8, steps=100))
    np.save(tmp_path / "dead.npy", drawn(0.5, 0.5, 0, steps=100))
    moetrace("ingest", tmp_path / "even.npy", tmp_path / "dead.npy")
    assert 0 == moetrace("check", "even", "--fail-on", "dead,collapse").code
    assert [0, 1] == [moetrace("check", "dead", *more).code for more in ((), ("--fail-on", "dead"))]
    assert 0 == moetrace("check", "even", "dead", "--fail-on", "drift").code
    assert 2 == moetrace("check", "--fail-on", "nothing").code
    shown = moetrace("check", "run", "--json").json["findings"]
    assert [("collapse", "error", "layer 0")] == [(row["name"], row["severity"], row["place"]) for row in shown]


def test_gaps_are_found_at_any_stride():
    """A gap is wider than the usual distance of the steps."""
    (found,) = gap_findings(np.array([0, 10, 20, 50, 60]))

    assert () == tuple(gap_findings(np.arange(0, 100, 10)))
    assert ("after step 20", "1 gap in the steps (stride 10): 20 to 50") == (found.place, found.evidence)
