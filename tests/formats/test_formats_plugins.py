"""Formats of installed packages: the example of the how-to, recognised, forced, listed, and what it does wrong."""

import re
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

import moetrace as mt
from moetrace.formats.readers import chosen_format, names

EXAMPLE = re.search(r"```python\n(# acme.py\n.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)[1]
LOG = "#acme\n1 3 5,3\n1 4 2,6\n2 3 4,4\n2 4 1,7\n"
COUNTS = [[[5, 3], [2, 6]], [[4, 4], [1, 7]]]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install the example, or *source*, as a package acme 1.0 in a folder of its own."""

    def make(source=EXAMPLE, where="acme:Acme", name="acme"):
        site = tmp_path / "site"
        about = site / "acme-1.0.dist-info"
        about.mkdir(parents=True)
        (site / "acme.py").write_text(source)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[moetrace.formats]\n{name} = {where}\n")
        monkeypatch.syspath_prepend(site)

    yield make
    sys.modules.pop("acme", None)


@pytest.fixture
def log(tmp_path):
    """A dump of that format."""
    path = tmp_path / "run.log"
    path.write_text(LOG)
    return path


def test_an_installed_format_is_one_of_ours(install, log, moetrace):
    """Recognised, forced with a setting, listed, and named by an unknown one."""
    install()
    found = mt.read_trace(log)
    doubled = mt.read_trace(log, format="acme:scale=2")
    listed = moetrace("ingest", "--list-formats", "--json").json["formats"]
    done = moetrace("ingest", log, "--json").json["traces"][0]

    assert (COUNTS, (3, 4), "acme") == (found.counts.tolist(), found.layers, found.info.format)
    assert np.array_equal(2 * found.counts, doubled.counts)
    assert {"format": "acme", "settings": "scale", "needs": "a text file that begins with #acme"} in listed
    assert ("run", "acme") == (done["name"], done["format"])
    with pytest.raises(mt.SettingError, match="no format 'acm'; did you mean 'acme'"):
        chosen_format(log, "acm")


def test_without_its_package_it_is_not_there(log):
    """And nothing else claims the dump."""
    assert "acme" not in names()
    with pytest.raises(mt.TraceError, match="unrecognised format; known formats: parts"):
        chosen_format(log)


def test_a_mark_of_ours_comes_first_and_a_table_last(install, tmp_path, small):
    """One that claims everything gets what would be a table, and no GGUF file."""
    install(EXAMPLE.replace('file.read(5) == b"#acme"', "True"))
    (tmp_path / "x.csv").write_text("step,expert,tokens\n1,0,3\n")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))

    assert ("acme", "imatrix") == tuple(chosen_format(tmp_path / name).name for name in ("x.csv", "x.gguf"))
    assert "csv" == chosen_format(tmp_path / "x.csv", "csv").name


@pytest.mark.parametrize(
    ("source", "where", "said"),
    [
        ("import nowhere_to_be_found", "acme:Acme", "acme:Acme of acme 1.0: the module cannot be imported: No module"),
        (EXAMPLE, "acme:Other", "acme:Other of acme 1.0: the module has no Other"),
        (EXAMPLE, "acme:np", "acme:np of acme 1.0: is no moetrace.Format called acme with a name"),
        (EXAMPLE.replace("scale: int = 1", "scale: int"), "acme:Acme", "of acme 1.0: cannot be made without settings"),
        (EXAMPLE.replace('"acme"', '"other"'), "acme:Acme", "of acme 1.0: is no moetrace.Format called acme"),
        (EXAMPLE.replace("def claims", "def takes"), "acme:Acme", "of acme 1.0: is no moetrace.Format called acme"),
    ],
)
def test_a_broken_package_is_named(install, log, source, where, said):
    """Also where the format is only looked for; naming another one gets by."""
    install(source, where)

    for spec in (None, "acme"):
        with pytest.raises(mt.SettingError, match=re.escape(said)):
            chosen_format(log, spec)
    assert "log" == chosen_format(log, "log").name


def test_a_name_of_ours_is_taken(install, log):
    """Two formats of one name could not be told apart."""
    install(EXAMPLE.replace('"acme"', '"csv"'), name="csv")

    with pytest.raises(mt.SettingError, match="is called csv, like one of moetrace"):
        chosen_format(log)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'file.read(5) == b"#acme"',
            "1 / 0",
            "could not be looked at by the format acme of acme 1.0: division",
        ),
        (
            "return mt.Reading(lambda",
            "return list(lambda",
            "could not be read by the format acme of acme 1.0: 'function'",
        ),
        ("step, layer, counts =", "step, layer =", "could not be read by the format acme of acme 1.0: too many values"),
        ("dtype=np.int64", "dtype=float", "its cells are not four arrays of int64 with one axis"),
        ("self.scale *", "-1 *", "a count is negative"),
        ("yield mt.dense_cells(", "yield mt.Cells(*3 * [np.arange(2)], np.arange(3)); (", "of different lengths"),
    ],
)
def test_what_goes_wrong_within_names_the_package(install, log, old, new, said):
    """In a line with the file and the way out."""
    assert old in EXAMPLE
    install(EXAMPLE.replace(old, new))

    with pytest.raises(mt.TraceError, match=re.escape(said)) as refused:
        mt.read_trace(log)
    assert str(refused.value).startswith(str(log))
    assert "name another format than acme with --from" in str(refused.value)


@pytest.fixture
def acme(monkeypatch):
    """The class of the example, installed nowhere."""
    module = ModuleType("acme")
    monkeypatch.setitem(sys.modules, "acme", module)
    exec(EXAMPLE, module.__dict__)
    return module.Acme


def test_the_check_passes_the_example(acme, log):
    """And gives the trace."""
    assert COUNTS == mt.check_format(acme(), log).counts.tolist()
    assert np.array_equal(2 * np.array(COUNTS), mt.check_format(acme(scale=2), str(log)).counts)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"needs": ""}, "needs says nothing"),
        ({"needs": "a\nb"}, "needs is more than a line"),
        ({"claims": lambda *_: False}, "is not claimed"),
        ({"claims": lambda *_: True}, "what is empty or missing is claimed: empty"),
    ],
)
def test_the_check_notices_each_fault(acme, log, fault, said):
    """Of what it says, and of what it claims."""
    for name, value in fault.items():
        setattr(acme, name, value)

    with pytest.raises(AssertionError, match=said):
        mt.check_format(acme(), log)


@pytest.mark.parametrize(("pieces", "said"), [(2, "others the second time"), (0, "there is no cell")])
def test_the_check_notices_a_stream_that_ends(acme, log, pieces, said):
    """Reading starts it again where steps are out of order."""
    read = acme.read

    def once(self, path):
        reading = read(self, path)
        left = iter([*reading.cells()][:pieces])
        return replace(reading, cells=lambda: left)

    acme.read = once

    with pytest.raises(AssertionError, match=said):
        mt.check_format(acme(), log)
