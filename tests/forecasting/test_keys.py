"""The key of a cached result: a change of code that matters gives another, a comment or a docstring does not."""

import shutil
from pathlib import Path

import pytest
from conftest import thorough_but

import moetrace
from moetrace.forecasting.keys import code_digest, used_modules

PACKAGE = Path(moetrace.__file__).parent
USED = sorted(used_modules(PACKAGE))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package that may be changed."""
    return Path(shutil.copytree(PACKAGE, tmp_path_factory.mktemp("code") / "moetrace"))


def path_of(package, module):
    """The file of a module."""
    return (package / module.replace(".", "/")).with_suffix(".py")


def test_what_results_depend_on_is_used():
    """The trace, states, noise and every predictor are; how results are shown, stored and placed is not."""
    assert {"trace", "words", "analysis.states", "analysis.variogram", "forecasting.layers"} <= set(USED)
    assert {f"forecasting.predictors.{name}" for name in ("arima", "lstm", "averages", "base", "network")} <= set(USED)
    assert not [name for name in USED if name.startswith(("report", "cli", "placement", "workspace", "formats"))]


@pytest.mark.slow
def test_comments_and_docstrings_do_not_count(copy):
    """In whatever module; the key is that of the code."""
    texts = {path_of(copy, module): path_of(copy, module).read_text() for module in USED}
    for path, text in texts.items():
        path.write_text("# A comment.\n" + text.replace('"""', '"""In other words: ', 1) + "\n# Another one.\n")
    commented = code_digest.__wrapped__(copy)
    for path, text in texts.items():
        path.write_text(text)

    assert commented == code_digest(PACKAGE)


@pytest.mark.parametrize("module", thorough_but(["trace", "forecasting.layers"], USED))
@pytest.mark.slow
def test_code_counts(module, copy):
    """A constant more in each module that matters is another key."""
    path = path_of(copy, module)
    text = path.read_text()

    path.write_text(f"{text}\nMORE = 1\n")
    changed = code_digest.__wrapped__(copy)
    path.write_text(text)

    assert changed != code_digest(PACKAGE)


@pytest.mark.parametrize("constant", ["LEAST_ROWS = 5", "MOST_DISTANCES = 100_000"])
@pytest.mark.slow
def test_a_number_of_the_trace_counts(constant, copy):
    """On which windows and strides, and so results, depend."""
    path = path_of(copy, "trace")
    text = path.read_text()
    assert constant in text

    path.write_text(text.replace(constant, f"{constant}1"))
    changed = code_digest.__wrapped__(copy)
    path.write_text(text)

    assert changed != code_digest(PACKAGE)
