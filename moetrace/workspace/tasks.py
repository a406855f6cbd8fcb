"""Where the tasks of a backtest or a plan run: in this process, on the cores of this machine, or on a Dask cluster."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from moetrace.errors import SettingError, WorkspaceError
from moetrace.forecasting.backtest import Run, Task
from moetrace.workspace.memory import keep_freed_memory

# Anything else keeps a Dask client waiting for a minute, and its end fails.
ADDRESS = re.compile(r"((tcp|tls|ws|wss|ucx)://)?([\w.-]+|\[[\da-fA-F:]+\]):\d{1,5}")
# Seconds until a cluster has to have answered.
PATIENCE = 30
# Seconds after which a worker checks again whether its parent lives.
WATCH_EVERY = 0.5

T = TypeVar("T")


def runner(jobs: int = 1, dask: str | None = None) -> Run:
    """A function that runs tasks with *jobs* processes, or on the Dask cluster at the address *dask*.

    Workers open traces by their paths and read one layer at a time: the cluster has to see the files of trace
    and results under the same paths. The results are the same to the last bit everywhere.
    Raises `SettingError` for an invalid address; running raises `WorkspaceError` for a cluster that does not answer.

    >>> from pathlib import Path
    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=1500), mt.settling(900, steps=1500)])
    >>> test = mt.evaluate(trace, [mt.WindowMean()], [500], results=mt.ResultFolder(Path("kept")), run=mt.runner(1))
    >>> test.computed, test.reused
    (2, 0)
    """
    if dask is not None:
        if not ADDRESS.fullmatch(dask):
            raise SettingError(f"{dask!r} is not the address of a Dask cluster, such as tcp://host:8786")
        return partial(_on_cluster, dask)
    return _one_by_one if jobs == 1 else partial(_on_cores, jobs)


def _run(task: Task[T]) -> T:
    with one_thread():
        return task.run()


def _one_by_one(tasks: Sequence[Task[T]]) -> Iterator[T]:
    return map(_run, tasks)


def _on_cores(jobs: int, tasks: Sequence[Task[T]]) -> Iterator[T]:
    if len(tasks) < 2:
        yield from _one_by_one(tasks)
        return
    from joblib import Parallel, delayed, parallel_config

    workers = parallel_config("loky", n_jobs=min(jobs, len(tasks)), inner_max_num_threads=1, initializer=_follow_parent)
    with warnings.catch_warnings(), workers:
        # A worker that has grown by 300 MB, as by compiling the LSTM, is replaced, and a thread of loky's warns of it:
        # where warnings are errors that thread would end, and nobody would hand out tasks any more.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        # One task at a time to each: what is handed out in advance would be lost work after a kill.
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        yield from parallel(delayed(_run)(task) for task in tasks)


def _follow_parent() -> None:
    """Leave the keyboard to the parent of this process, and end when that has ended, however it did."""
    keep_freed_memory()
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _on_cluster(address: str, tasks: Sequence[Task[T]]) -> Iterator[T]:
    if not tasks:
        return
    from joblib import Parallel, delayed, parallel_config

    try:
        from distributed import Client
    except ImportError:
        raise WorkspaceError("a Dask cluster needs Dask: pip install 'moetrace[dask]'") from None
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
        client.wait_for_workers(1, timeout=PATIENCE)
    except (OSError, TimeoutError, ValueError) as error:
        raise WorkspaceError(
            f"no Dask cluster with workers answers at {address}: {error or 'it took too long'}"
        ) from error
    with client, parallel_config("dask", scheduler_host=address, n_jobs=-1):
        yield from Parallel(return_as="generator_unordered", batch_size=1)(delayed(_run)(task) for task in tasks)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of BLAS and XLA in this process: many workers share the cores, and sums keep their order."""
    from threadpoolctl import threadpool_limits

    if "jax" not in sys.modules:  # once it is loaded it no longer reads them
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    with threadpool_limits(1):
        yield
