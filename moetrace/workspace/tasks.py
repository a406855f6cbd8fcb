"""Backtests and forecasts whose results are kept: resumed where they stopped, on one core, many, or a cluster.

The unit of work is a layer, or a fit that serves all layers. Whoever does it opens the trace by its
path, reads one layer at a time, and puts each result into the store as it is made. What is there
already is not made again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from moetrace.errors import WorkspaceError
from moetrace.forecasting import intervals
from moetrace.forecasting.backtest import Facts, score_layer
from moetrace.forecasting.fits import Histories, Pooled, Timed, fitted_when, timed_fit
from moetrace.forecasting.forecasts import Progress, check_distinct, forecast_layer
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import Covered
from moetrace.trace import LayerLoad
from moetrace.workspace.results import Fit, Result, Store
from moetrace.workspace.work import Results, Source, Work

# Seconds until a cluster has to have answered.
PATIENCE = 30
# Seconds between two looks of a worker at whether its parent lives.
WATCH_EVERY = 0.5


@dataclass(frozen=True)
class Missing:
    """What the store lacks of one predictor and layer: *scores*, and forecasts *ahead*."""

    made: Predictor
    scores: tuple[Result, ...]
    ahead: tuple[Result, ...]

    @property
    def horizons(self) -> set[int]:
        """The horizons to score."""
        return {result.horizon for result in self.scores}

    def __len__(self) -> int:
        return len(self.scores) + len(self.ahead)


@dataclass(frozen=True)
class Need:
    """A fit for all layers, made at a cutoff *at* (None: on other runs), and the part of its seconds a score bears."""

    fit: Fit
    made: Predictor
    at: int | None
    share: float


Needs = Mapping[tuple[str, int], Need]
"""The fits for all layers by predictor and cutoff."""


@dataclass(frozen=True, eq=False)
class Training:
    """A fit for all layers that the store lacks, on the trace itself or on the runs to *train_on*."""

    source: Source
    train_on: Sequence[Source]
    store: Store
    need: Need


@dataclass(frozen=True, eq=False)
class Task:
    """The missing results of one layer, and the fits for all layers that they need."""

    source: Source
    store: Store
    layer: int
    covered: Covered
    missing: tuple[Missing, ...]
    needs: Needs


Piece = Training | Task
"""A unit of work."""


def compute(
    work: Work, store: Store, progress: Progress | None = None, *, jobs: int = 1, dask: str | None = None
) -> Results:
    """Make what *store* lacks of *work*, with *jobs* processes, or on the Dask cluster at the address *dask*.

    The cluster has to see the files of trace and store under the same paths. Raises `SettingError` for
    a predictor given twice, `WorkspaceError` for a cluster that does not answer.
    """
    check_distinct(work.predictors)
    store.sweep(work.trace.name)
    by_layer = {layer: _missing(work, store, layer) for layer in work.trace.layers}
    tasks = {layer: missing for layer, missing in by_layer.items() if missing}
    needs = _needs(work, [missing for layer in tasks.values() for missing in layer])
    untrained = {need.fit: need for need in needs.values() if not store.has_fit(need.fit)}
    steps = _all_steps(work, store, tasks, needs, untrained.values(), jobs, dask)
    for done, _ in enumerate(steps, 1):
        if progress is not None:
            progress(done, len(untrained) + len(tasks))
    made = sum(len(missing) for layer in tasks.values() for missing in layer)
    return Results(work, store, made, len(work) - made)


def _all_steps(
    work: Work,
    store: Store,
    layers: Mapping[int, tuple[Missing, ...]],
    needs: Needs,
    untrained: Iterable[Need],
    jobs: int,
    dask: str | None,
) -> Iterator[None]:
    """Yields after each fit for all layers and each layer that is done."""
    yield from _spread([Training(work.source, work.train_on, store, need) for need in untrained], jobs, dask)
    tasks = [Task(work.source, store, layer, work.covered, missing, needs) for layer, missing in layers.items()]
    yield from _spread(tasks, jobs, dask)


def _missing(work: Work, store: Store, layer: int) -> tuple[Missing, ...]:
    """What *store* lacks of one layer, by predictor."""
    found = []
    for made in work.predictors:
        named = {horizon: work.result(made, layer, horizon) for horizon in work.horizons}
        scores = [r for horizon, r in named.items() if work.cutoffs(horizon) and not store.has_scores(r)]
        ahead = [r for r in named.values() if work.ahead_of(made) and not store.has_forecast(r)]
        found.append(Missing(made, tuple(scores), tuple(ahead)))
    return tuple(missing for missing in found if len(missing))


# --- fits for all layers ----------------------------------------------------------------------


def _needs(work: Work, missing: Sequence[Missing]) -> Needs:
    """The fits for all layers that the *missing* results need."""
    needs: dict[tuple[str, int], Need] = {}
    for made in dict.fromkeys(part.made for part in missing if part.made.pools_layers):
        own = [part for part in missing if part.made == made]
        horizons = {horizon for part in own for horizon in part.horizons}
        scored = [cutoff for cutoff, covered in work.covered.items() if horizons & set(covered)]
        needs |= _needs_of(work, made, scored)
        if any(part.ahead for part in own):
            needs |= _needs_of(work, made, [work.end])
    return needs


def _needs_of(work: Work, made: Predictor, cutoffs: Sequence[int]) -> dict[tuple[str, int], Need]:
    layers = len(work.trace.layers)
    if work.train_on:
        fit, share = work.fit(made, None), 1 / max(1, len(cutoffs)) / layers
        return {(label(made), cutoff): Need(fit, made, None, share) for cutoff in cutoffs}
    when = fitted_when(made, work.start, cutoffs)
    return {(label(made), c): Need(work.fit(made, at), made, at, (c == at) / layers) for c, at in when.items()}


# --- one piece of work ------------------------------------------------------------------------


def do(piece: Piece) -> None:
    """Make what a piece of work is for, and keep it."""
    with one_thread():
        if isinstance(piece, Training):
            _train(piece)
        else:
            _do_layer(piece)


def _train(training: Training) -> None:
    need = training.need
    runs = [training.source] if need.at is not None else training.train_on
    training.store.put_fit(need.fit, timed_fit(need.made, Histories([run.open() for run in runs], need.at)))


def _do_layer(task: Task) -> None:
    """Make the missing results of one layer, and keep each as it is made."""
    load = task.source.open().layer(task.layer)
    pooled = _pooled(task)
    horizons = {horizon for missing in task.missing for horizon in missing.horizons}
    facts = Facts.of(load, _covered(task.covered, horizons)) if horizons else None
    for missing in task.missing:
        if facts is not None and missing.scores:
            _score(replace(facts, covered=_covered(task.covered, missing.horizons)), missing, pooled, task.store)
        for result in missing.ahead:
            _forecast(load, missing.made, result, pooled, task)


def _pooled(task: Task) -> Pooled:
    learned = {need.fit: task.store.fit(need.fit, need.made) for need in task.needs.values()}
    return {
        place: Timed(learned[need.fit].fitted, learned[need.fit].seconds * need.share)
        for place, need in task.needs.items()
    }


def _covered(covered: Covered, horizons: set[int]) -> Covered:
    """What is *covered* of *horizons* alone."""
    own = {cutoff: [horizon for horizon in there if horizon in horizons] for cutoff, there in covered.items()}
    return {cutoff: there for cutoff, there in own.items() if there}


def _score(facts: Facts, missing: Missing, pooled: Pooled, store: Store) -> None:
    test = score_layer(facts, missing.made, pooled)
    for result in missing.scores:
        scores, shares = (frame[frame["horizon"] == result.horizon] for frame in (test.scores, test.shares))
        store.put_scores(result, scores, shares)


def _forecast(load: LayerLoad, made: Predictor, result: Result, pooled: Pooled, task: Task) -> None:
    scored = any(result.horizon in horizons for horizons in task.covered.values())
    misses = task.store.scores(result)["squared_miss"].tolist() if scored else []
    deviation = intervals.spread(load, result.horizon) * intervals.scale(misses)
    task.store.put_forecast(result, forecast_layer(load, made, pooled, result.horizon, deviation))


# --- who does it ------------------------------------------------------------------------------


def _spread(tasks: Sequence[Piece], jobs: int, dask: str | None) -> Iterator[None]:
    """Do all *tasks*; yields whenever one is done."""
    if dask is not None and tasks:
        yield from _on_cluster(tasks, dask)
    elif jobs == 1 or len(tasks) < 2:
        yield from map(do, tasks)
    else:
        yield from _on_cores(tasks, jobs)


def _on_cores(tasks: Sequence[Piece], jobs: int) -> Iterator[None]:
    from joblib import Parallel, delayed, parallel_config

    with parallel_config("loky", n_jobs=min(jobs, len(tasks)), inner_max_num_threads=1, initializer=_follow_parent):
        # One task at a time to each: what is handed out in advance would be lost work after a kill.
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        yield from parallel(delayed(do)(task) for task in tasks)


def _follow_parent() -> None:
    """Leave the keyboard to the parent of this process, and end when that has ended, however it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_EVERY)
    os._exit(1)


def _on_cluster(tasks: Sequence[Piece], address: str) -> Iterator[None]:
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
        yield from Parallel(return_as="generator_unordered", batch_size=1)(delayed(do)(task) for task in tasks)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of BLAS and XLA in this process: many workers share the cores, and sums keep their order."""
    from threadpoolctl import threadpool_limits

    if "jax" not in sys.modules:  # later it would not listen
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    with threadpool_limits(1):
        yield
