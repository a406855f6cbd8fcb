"""What the tests share: a small synthetic trace, the sample trace, and the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from threadpoolctl import threadpool_limits

from moetrace import LoadTrace, TraceError
from moetrace.cli import main
from moetrace.synthetic import Course, settling, synthetic_trace

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_traces" / "gpt-moe-8e-a.parquet"

# How long an example takes says nothing on a machine with other work.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# As commands have it: threads of BLAS would wait for each other, and for those of the other workers.
threadpool_limits(1)
os.environ["OPENBLAS_NUM_THREADS"] = "1"


plain_init = TraceError.__init__


def with_three_parts(error: TraceError, where: str, problem: str, way_out: str) -> None:
    """Every error of a trace that any test meets says where, what is wrong, and the way out."""
    assert all(isinstance(part, str) and part.strip() for part in (where, problem, way_out))
    plain_init(error, where, problem, way_out)


TraceError.__init__ = with_three_parts  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("thorough")}
    items.sort(key=lambda item: item.path not in slow)


def thorough_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The *cases* of a parameter; `make test` runs those *kept*, `make test-thorough` the others."""
    few = [*kept]
    return [case if case in few else pytest.param(*_several(case), marks=pytest.mark.thorough) for case in cases]


def _several(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


@pytest.fixture
def small() -> LoadTrace:
    """Two layers of four experts over 60 steps, from step 10."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(100, [0.4, 0.3, 0.2, 0.1], size=(60, 2))
    return LoadTrace.from_counts(counts, name="small", steps=np.arange(10, 70), layers=[3, 5])


@pytest.fixture(scope="session")
def settled() -> LoadTrace:
    """A synthetic trace of 4,000 steps: one layer settles at step 1,500, the other never."""
    quick = settling(1500, steps=4000, tokens=8000)
    return synthetic_trace([quick, Course(steps=4000, tokens=8000, changes=((1, 0.01),))], name="settled", seed=5)


def long_table(trace: LoadTrace) -> pa.Table:
    """The trace as a logger would write it: one row for each step, layer and expert."""
    counts = trace.counts
    step, layer, expert = np.indices(counts.shape)
    return pa.table(
        {
            "step": trace.steps[step.ravel()],
            "layer": np.array(trace.layers)[layer.ravel()],
            "expert": expert.ravel(),
            "tokens": counts.ravel(),
        }
    )


@pytest.fixture
def long_file(small: LoadTrace, tmp_path: Path) -> Path:
    """The small trace as a long Parquet file."""
    path = tmp_path / "small.parquet"
    pq.write_table(long_table(small), path)
    return path


@dataclass
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The document on stdout."""
        return json.loads(self.out)


@pytest.fixture
def moetrace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Run a command in a folder of its own: ``moetrace("states", "--json")``."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(part) for part in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take longer than all the rest: for tests of what else is in them."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """The address of a scheduler of Dask, and the processes of its two workers."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'moetrace[dask]'")
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file)]
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", *common, "--host", "127.0.0.1", "--port", "0"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", *common, "--no-nanny", "--nthreads", "1"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    processes = [subprocess.Popen([*scheduler, "--no-dashboard"], **quiet)]
    processes += [subprocess.Popen([*worker, "--no-dashboard"], **quiet) for _ in range(2)]
    while not file.exists():
        time.sleep(0.05)
    with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
        address = client.scheduler.address
    yield address, processes[1:]
    for process in processes:
        process.kill()
        process.wait()
