"""Every recipe of docs/recipes.md runs, and gives the counts that its sample holds."""

import re
import shlex
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from moetrace import open_trace

SECTIONS = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("\n## ")[1:]
COUNTS = [[[15_000, 987]], [[14_000, 1_987]]]
CHOICES = [[[2, 1]], [[1, 2]]]


@pytest.fixture
def mlflow(monkeypatch):
    """As much of MLflow's client as the recipe calls."""
    history = {f"moe/layer_0/expert_{e}": [(1, COUNTS[0][0][e]), (2, COUNTS[1][0][e])] for e in (0, 1)}

    class MlflowClient:
        def get_run(self, _):
            return SimpleNamespace(data=SimpleNamespace(metrics={"loss": 0.5, **history}))

        def get_metric_history(self, _, name):
            return [SimpleNamespace(step=step, value=float(value)) for step, value in history[name]]

    module: Any = ModuleType("mlflow")
    module.MlflowClient = MlflowClient
    monkeypatch.setitem(sys.modules, "mlflow", module)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
@pytest.mark.usefixtures("mlflow")
@pytest.mark.slow
def test_a_recipe_gives_the_counts_of_its_sample(section, moetrace, tmp_path, monkeypatch):
    """As it stands on the page, in a folder that holds the sample."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r'```text title="([^"]+)"\n(.*?)```', section, re.DOTALL):
        (tmp_path / name).write_text(text)
    for command in re.findall(r"\$ moetrace (.*)", section):
        done = moetrace(*shlex.split(command), "-w", tmp_path)
        assert 0 == done.code, done.err
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    trace = names["trace"] if "trace" in names else open_trace(next((tmp_path / "traces").iterdir()))

    assert (CHOICES if section.startswith("Padding") else COUNTS) == trace.counts.tolist()


def test_the_page_is_where_errors_say():
    """They name it."""
    assert SECTIONS
    assert "recipes.md" in (ROOT / "mkdocs.yml").read_text()
