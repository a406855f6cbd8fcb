"""What holds for every registered format."""

from typing import Literal

import numpy as np
import pytest
from dumps import DUMPS, FORMS, OPTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrace import LoadTrace, ReadOptions, SettingError, TraceError, check_format, read_trace
from moetrace.formats import FORMATS, reader_of, sources_in
from moetrace.formats.readers import chosen_format
from moetrace.settings import label, setting_types

# Dumps without numbers of steps: so many passes lie between two; and of those without numbers of layers.
PASSES = {"sglang": 1, "mindie": 8, "prometheus": 1}
LAYERS = {"mindie": (0, 1)}
# What holds one step has tests of its own (`test_formats_imatrix.py`).
OF_ONE_WINDOW = ("imatrix",)
# Findings of traces that Hypothesis makes up, which no router would.
ODD = ("tokens-differ", "smoothed", "cumulative")


def test_every_format_has_a_dump_to_read():
    """A format without a sample is not tested."""
    assert sorted(FORMATS) == sorted([*DUMPS, *OF_ONE_WINDOW])


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.slow
def test_a_dump_is_sniffed_and_its_counts_are_those_of_the_source(small, tmp_path, name):
    """Counts, steps and layers come back without being told the format."""
    path = DUMPS[name](small, tmp_path)

    found = read_trace(path, options=OPTIONS.get(name, ReadOptions()))

    assert name == found.info.format
    assert np.array_equal(small.counts, found.counts)
    numbered = PASSES[name] * np.arange(1, len(small.steps) + 1) if name in PASSES else small.steps
    assert np.array_equal(numbered, found.steps)
    assert LAYERS.get(name, small.layers) == found.layers


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_a_format_are_sniffed_and_their_counts_are_those_of_the_source(small, tmp_path, name):
    """What is fuzzed is read where it is whole."""
    found = read_trace(FORMS[name](small, tmp_path))

    assert name.partition("+")[0] == found.info.format
    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers
    assert () == found.info.findings


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.slow
def test_a_clean_dump_has_no_finding(small, tmp_path, name):
    """The doctor is silent where there is nothing to say."""
    path = DUMPS[name](small, tmp_path)

    assert () == read_trace(path, options=OPTIONS.get(name, ReadOptions())).info.findings


@pytest.mark.parametrize("name", DUMPS)
def test_a_format_claims_its_own_dump(small, tmp_path, name):
    """Of formats with marks of their own exactly one is sniffed, and the dump is one source."""
    path = DUMPS[name](small, tmp_path)

    assert name == chosen_format(path).name
    assert [path] == sources_in(path)


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.slow
def test_our_own_keep_what_plug_ins_have_to(small, tmp_path, name):
    """The function that a plug-in is tested with."""
    options = OPTIONS.get(name, ReadOptions())
    path = DUMPS[name](small, tmp_path)

    assert np.array_equal(small.counts, check_format(reader_of(path, options, name), path, options).counts)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 500, b"nothing of the kind\n" * 50, b"\x80\x04\x95K.", b"PK\x03\x04"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_dump_is_refused_in_one_line(tmp_path, name, content):
    """Forced upon the wrong file, every format raises a `TraceError` naming it."""
    path = tmp_path / "dump.bin"
    path.write_bytes(content)

    with pytest.raises(TraceError, match=r"dump\.bin") as caught:
        read_trace(path, format=name).counts  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.slow
def test_a_truncated_dump_is_refused_or_whole(small, tmp_path, name, share):
    """A file cut short never gives other counts for a step that it holds, and never a traceback."""
    path = DUMPS[name](small, tmp_path)
    last = max((child for child in path.rglob("*") if child.is_file()), default=path) if path.is_dir() else path
    content = last.read_bytes()
    last.write_bytes(content[: int(len(content) * share)])

    try:
        found = read_trace(path, format=name, options=OPTIONS.get(name, ReadOptions()))
    except TraceError:
        return
    shared = slice(len(found.steps)) if name in PASSES else np.isin(small.steps, found.steps)
    if len(found.steps) > 1:
        assert np.array_equal(small.counts[shared][:-1], found.counts[:-1])


@pytest.mark.parametrize("name", DUMPS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=hnp.arrays(
        np.int64,
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 4, 6])),
        elements=st.integers(1, 50),
    )
)
@pytest.mark.slow
def test_any_counts_survive(tmp_path_factory, name, counts):
    """What Hypothesis makes up comes back from every format."""
    counts[..., -1] += counts.sum(axis=2).max() - counts.sum(axis=2)
    trace = LoadTrace.from_counts(counts)
    options = OPTIONS.get(name, ReadOptions())
    accepting = ReadOptions(**{**vars(options), "accept": ODD})
    path = DUMPS[name](trace, tmp_path_factory.mktemp("dump"))

    assert np.array_equal(counts, read_trace(path, options=accepting).counts)


def test_an_unknown_format_names_the_known_ones(tmp_path):
    """`--from` with a wrong name lists the right ones, and the one that was meant."""
    with pytest.raises(SettingError, match=r"there is no format 'exel'; there are .*parquet, .*csv"):
        chosen_format(tmp_path, "exel")
    with pytest.raises(SettingError, match=r"did you mean 'csv'\? There are .*parquet, .*csv"):
        chosen_format(tmp_path, "cvs:experts=4")


# A value of each type of setting, and one that it cannot have.
VALUES = {int: ("8", "x"), str: ("(?P<layer>.)(?P<expert>.)", None), Literal["prefill", "decode"]: ("decode", "both")}


@pytest.mark.parametrize("name", FORMATS)
def test_a_setting_of_a_format_is_taken_and_one_that_it_has_not_is_refused(tmp_path, name):
    """Each by its name, told what there is; a label makes the same format again."""
    types = setting_types(FORMATS[name])
    for setting, kind in types.items():
        good, bad = VALUES[kind]
        taken = chosen_format(tmp_path, f"{name}:{setting}={good}")
        assert good == str(getattr(taken, setting))
        assert taken == chosen_format(tmp_path, label(taken))
        if bad is not None:
            with pytest.raises(SettingError, match=f"{name}:{setting} is "):
                chosen_format(tmp_path, f"{name}:{setting}={bad}")
    with pytest.raises(SettingError, match=f"{name} has no setting 'colour'; it has {', '.join(types) or 'none'}"):
        chosen_format(tmp_path, f"{name}:colour=red")


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.slow
def test_a_setting_without_a_name_is_of_the_format_that_is_told(small, tmp_path, name):
    """So that only what the dump does not say has to be said."""
    path = DUMPS[name](small, tmp_path)

    assert name == chosen_format(path, ":").name
    with pytest.raises(SettingError, match=f"{name} has no setting 'colour'"):
        read_trace(path, format=":colour=red")
