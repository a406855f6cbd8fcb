"""The public names: all of them are there, and the example of each function runs as it stands."""

import doctest
import inspect

import pytest

import moetrace as mt

NAMES = vars(mt)["__all__"]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(mt, name))]


def test_every_public_name_is_there_and_listed():
    """As `dir` shows them."""
    assert {*NAMES} <= {*dir(mt)}
    assert all(getattr(mt, name) is not None for name in NAMES)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_the_example_of_a_function_runs(name, tmp_path, monkeypatch):
    """In an empty folder, with nothing but what it imports itself."""
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(getattr(mt, name)), {}, name, None, 0)
    report = []

    assert examples.examples, f"{name} has no example"
    assert 0 == doctest.DocTestRunner(verbose=False).run(examples, out=report.append).failed, "".join(report)
