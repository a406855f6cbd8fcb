"""A notebook shows answers and figures inline, without pyplot and without a magic command."""

import base64
import os

import pytest
from conftest import ROOT

CELLS = (
    "import moetrace as mt\ntrace = mt.synthetic_trace([mt.settling(500, steps=3000)], name='run')\nmt.states(trace)",
    "found = mt.predict(trace, horizon=500, predictor=['window_mean'])\nfound",
    "found.frame('summary').head(1)",
    "mt.states(trace).figure()",
    "found.frame('gone')",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries, about sockets and loops
@pytest.mark.thorough
def test_a_notebook_shows_what_is_found(tmp_path, monkeypatch):
    """An answer and its table as HTML, a figure as a picture; an error names the argument."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(folder, str(tmp_path))
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    states, predicted, frame, drawn = (own[-1].data for own in outputs[:-1])

    assert "<strong>run: " in states["text/html"]
    assert "<table>" in states["text/html"]
    assert predicted["text/plain"].startswith("<moetrace.predict: run: ")
    assert "window_mean" in frame["text/html"]
    assert base64.b64decode(drawn["image/png"]).startswith(b"\x89PNG")
    assert [1, 1, 1, 1] == [len(own) for own in outputs[:-1]]  # nothing is printed, not even a warning
    assert ("SettingError", "there is no table 'gone'") == (outputs[-1][0].ename, outputs[-1][0].evalue[:24])
