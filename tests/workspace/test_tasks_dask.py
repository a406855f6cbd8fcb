"""The same work on a Dask cluster: a scheduler and two workers on this machine, one of which is lost on the way."""

import signal
import threading
import time
from importlib.util import find_spec

import pytest
from test_tasks import assert_same, computed, path  # noqa: F401 - `path` is a fixture

from moetrace import ResultFolder, WorkspaceError

# Of the libraries, about sockets and loops they leave to be collected.
pytestmark = [
    pytest.mark.skipif(not find_spec("distributed"), reason="Dask is not installed: pip install 'moetrace[dask]'"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.thorough
def test_a_cluster_that_loses_a_worker_makes_the_same(path, tmp_path, cluster):  # noqa: F811
    """Its layers are done by the other; results equal those of one process to the last bit."""
    address, workers = cluster
    asked = ("sw_avg", "arima", "level")
    store = ResultFolder(tmp_path / "parts")
    lost = threading.Thread(target=_kill_at_first_result, args=(store, workers[0]))
    lost.start()
    found = computed(path, *asked, ahead=True, results=store, dask=address)
    lost.join()

    assert (36, 0) == (found.computed, found.reused)
    assert -signal.SIGKILL == workers[0].wait()
    assert workers[1].poll() is None
    assert_same(computed(path, *asked, ahead=True), found)


def _kill_at_first_result(store, worker):
    while not list(store.root.rglob("*.scores.parquet")):
        time.sleep(0.005)
    worker.kill()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(path, tmp_path, monkeypatch):  # noqa: F811
    """With the address."""
    monkeypatch.setattr("moetrace.workspace.tasks.PATIENCE", 1)

    with pytest.raises(WorkspaceError, match=r"no Dask cluster with workers answers at tcp://127.0.0.1:1"):
        computed(path, results=ResultFolder(tmp_path / "parts"), dask="tcp://127.0.0.1:1")
