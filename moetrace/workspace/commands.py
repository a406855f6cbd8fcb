"""What the commands do, from Python: a function for each, with its options as keywords and a result that shows itself.

The command line calls the same functions, with the groups of options that it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moetrace.analysis.about import findings_frame
from moetrace.analysis.imbalance import health_frame
from moetrace.analysis.shape import shape_frame
from moetrace.analysis.tables import BY_LAYER, states_tables, table_by_layer
from moetrace.comparison import Comparison
from moetrace.comparison import compare as compare_traces
from moetrace.doctor import check_known, examine, failing
from moetrace.errors import SettingError, check_several
from moetrace.files import write_bytes
from moetrace.forecasting.backtest import Backtest, Progress, evaluate
from moetrace.forecasting.keys import key_of
from moetrace.forecasting.predictors import QUICK
from moetrace.forecasting.summary import means_frame, summary_frame
from moetrace.frames import Later
from moetrace.placement.planning import Planning
from moetrace.placement.study import Placement
from moetrace.placement.study import place as place_trace
from moetrace.placement.systems import read_plan, systems_named, write_files
from moetrace.placement.verdict import at_most
from moetrace.reporting.answers import ADVICE_BESIDE_A_PLAN, alarm, first_answer, verdict_notes, worth
from moetrace.reporting.comparison import comparison_screen
from moetrace.reporting.figures import comparison, knee, plan_course, settling
from moetrace.reporting.phrases import count_of
from moetrace.reporting.residency import ages, coverage
from moetrace.reporting.screens import Screen, findings_screen, kept_screen, place_screen, predict_screen, states_screen
from moetrace.reporting.style import picture, styled
from moetrace.reporting.tables import csv
from moetrace.residency.runtimes import RUNTIMES, ResidentSets
from moetrace.residency.study import HORIZON, Residency, default_horizon
from moetrace.residency.study import hot as keep
from moetrace.trace import Finding, LoadTrace
from moetrace.workspace.found import Found, command
from moetrace.workspace.options import Backtesting, Device, Note, Selection, decode_of, silent
from moetrace.workspace.results import writing_forecast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetrace.forecasting.layers import EndForecast
    from moetrace.reporting.style import Figure
    from moetrace.workspace.options import Traced

STATUS = ("trace", "predictor", "layer", "status", "expected_error")


# --- what a trace shows --------------------------------------------------------------------------------------------


@command(Selection)
def states(trace: Traced, *, progress: Progress | None = None, selection: Selection) -> Found[LoadTrace]:
    """When the load of each layer became stable, how unbalanced it is, and its shape: ``moetrace states``.

    Tables of experts, of other settings, of the shape and of the course of the load are made when they are asked for.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)], name="run")
    >>> mt.states(trace).frame()["state"].tolist()
    ['stable']
    """
    own = selection.open(trace)
    made = states_tables(own, progress=progress)
    frames = Later(
        {name: partial(made.__getitem__, name) for name in made}
        | {"shape": partial(shape_frame, own)}
        | {name: partial(table_by_layer, own, name) for name in BY_LAYER}
    )
    screen, drawing = partial(states_screen, made["layers"]), partial(settling, made)
    return Found("states", own.name, screen, frames, own, {"settling": drawing})


@command(Selection)
def check(trace: Traced, *, fail_on: Sequence[str] = (), selection: Selection) -> Found[list[Finding]]:
    """What is wrong with a trace: ``moetrace check``. *failing* of the result has what fails, also by *fail_on*.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.check(trace)
    <moetrace.check: Examined 1 trace: no problems found.>
    """
    check_several(fail_on, "fail_on", "['collapse', 'dead']")
    check_known(fail_on)
    own = selection.open(trace)
    findings = examine(own)
    frame, fails = findings_frame(own.name, findings), failing(findings, own, tuple(fail_on))
    return Found(
        "check", own.name, partial(findings_screen, frame, 1), {"findings": frame}, findings,
        facts={"failing": fails},
    )  # fmt: skip


@command(Selection, Device)
def compare(
    a: Traced,
    b: Traced,
    *,
    gpus: int | None = None,
    redundant: int = 0,
    slots: int | None = None,
    progress: Progress | None = None,
    selection: Selection,
    device: Device,
) -> Found[Comparison]:
    """How far apart two loads are, and whether a plan or a resident set transfers: ``moetrace compare``.

    *a* and *b* may be parts of traces, ``"name:0-2000"``; the arguments are those of `comparison.compare`.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=6000)], name="run")
    >>> found = mt.compare(trace.select(last=3000), trace.select(first=3001), gpus=4)
    >>> found.same, found.transfer["slower_than_own"] < 0.03
    (False, True)
    """
    one, other = selection.open(a), selection.open(b)
    found = compare_traces(
        one, other, gpus=gpus, redundant=redundant, slots=slots, time=device.time(), progress=progress
    )
    screen = partial(comparison_screen, found.as_row() | {"transfer": found.transfer}, found.frames["layers"])
    notes = [f"Layers are compared in order: {list(one.layers)} of {one.name} with {list(other.layers)}"]
    return Found(
        "compare", one.name, screen, found.frames, found, notes=notes if one.layers != other.layers else (),
        facts={"experts": one.experts},
    )  # fmt: skip


# --- forecasts -----------------------------------------------------------------------------------------------------


@command(Selection, Backtesting)
def predict(
    trace: Traced,
    horizon: int | None = None,
    *,
    folder: str | Path | None = None,
    note: Note = silent,
    progress: Progress | None = None,
    selection: Selection,
    backtesting: Backtesting,
) -> Found[Backtest]:
    """How accurately the load can be forecast *horizon* steps ahead, and the forecast itself: ``moetrace predict``.

    ``frame("means")`` is the mean of each expert over the steps after the end. With a *folder* the forecast of every
    step is written there, as Parquet, and the means as CSV.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)], name="run")
    >>> found = mt.predict(trace, horizon=500, predictor=["window_mean"])
    >>> found.frame("means")["share"].sum().round(6)
    np.float64(1.0)
    """
    own = selection.open(trace)
    predictors, settings = backtesting.predictors(), backtesting.settings(note)
    asked, cutoffs = backtesting.windows(own, [horizon] if horizon else None, [1000], note, "--horizon")
    test = evaluate(own, predictors, asked, cutoffs, progress, ahead=True, **settings)
    over, statuses, files = asked[0], list[dict[str, Any]](), list[str]()
    forecasts: Iterable[EndForecast] = test.forecasts()
    if folder is not None:
        files = [str(Path(folder) / f"forecast-{over}.parquet"), str(Path(folder) / f"means-{over}.csv")]
        key = key_of([(result.trace, result.predictor, result.key) for result in test.evaluation.forecast_ahead])
        forecasts = writing_forecast(Path(files[0]), forecasts, key)

    def noted() -> Iterable[EndForecast]:
        for ahead in forecasts:
            statuses.append({name: getattr(ahead, name) for name in STATUS})
            yield ahead

    means = means_frame(noted(), over)
    if folder is not None:
        write_bytes(Path(files[1]), csv(means).encode())
    known, balance = pd.DataFrame(statuses, columns=list(STATUS)), health_frame(own)
    frames = {"summary": summary_frame(test.scores, backtesting.seed), "scores": test.scores, "means": means}
    drawings: dict[str, Callable[..., Figure]] = {}
    if (frames["summary"]["scored"] > 0).any():
        drawings["predictors"] = partial(comparison, {"summary": frames["summary"]})
    if len(frames["summary"]):
        screen: Screen | Callable[..., Screen] = partial(predict_screen, frames["summary"], over, known, balance)
    else:
        done = "made" if folder is None else "saved"
        text = f"Forecasts of the next {count_of(over, 'step')} are {done}, but not scored: the trace is too short."
        screen = Screen(f"{own.name}: {alarm(balance)}{text}")
    return Found(
        "predict", own.name, screen, frames | {"statuses": known}, test, drawings, files, facts={"horizon": over},
    )  # fmt: skip


# --- plans and sets ------------------------------------------------------------------------------------------------


@command(Selection, Backtesting, Device)
def place(
    trace: Traced,
    gpus: int | None = None,
    *,
    redundant: int | Sequence[int] = 0,
    horizon: int | None = None,
    least_gain: float = 0.0,
    tolerance: float = 0.01,
    dispatch: str = "even",
    nodes: int = 1,
    groups: int = 1,
    top_groups: int | None = None,
    plan: str | Path | None = None,
    system: Sequence[str] = (),
    model_layers: int = 0,
    first_layer: int | None = None,
    folder: str | Path | None = None,
    note: Note = silent,
    progress: Progress | None = None,
    selection: Selection,
    backtesting: Backtesting,
    device: Device,
) -> Found[Placement]:
    """Whether balancing is worth it on so many *gpus*, and the plan to deploy: ``moetrace place``.

    *redundant* may have several numbers to compare. *plan* is the file deployed today. With a *folder*, the plan is
    written there for every *system* (all that read one, unless named), and ``deploy`` has their flags.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)], name="run")
    >>> found = mt.place(trace, gpus=4, predictor=["window_mean"])
    >>> [len(experts) for experts in found.slots[0]]
    [2, 2, 2, 2]
    """
    if gpus is None:
        raise SettingError("missing option --gpus N: the number of GPUs that share a layer's experts")
    redundants = [redundant] if isinstance(redundant, int) else list(dict.fromkeys(redundant))
    if min(redundants) < 0:
        raise SettingError(f"redundant experts must be 0 or more, got {min(redundants)}")
    check_several(system, "system", "['sglang']")
    systems = systems_named(system)
    planning = Planning(gpus, redundants[0], least_gain, tolerance, dispatch, nodes, groups, top_groups, device.time())
    own = selection.open(trace)
    asked, cutoffs = backtesting.windows(own, [horizon] if horizon else None, [1000], note, "--horizon")
    for number in redundants:
        planning.with_redundant(number).check(own.experts)
    note(first_answer(own.name, at_most(own, planning)))
    if (decode := decode_of(own, selection.workspace)) is not None:
        bound = first_answer(decode.name, at_most(decode, planning))
        note(f"{bound} That is decode alone; `moetrace place {decode.name}` has its verdict.")
    deployed = None if plan is None else read_plan(Path(plan), own.layers, own.experts, gpus, first_layer)
    placed = place_trace(
        own, backtesting.predictors(QUICK), planning, asked[0], cutoffs, progress, redundants=redundants,
        deployed=deployed, expert_bytes=device.expert_bytes, first=backtesting.first,
        systems=[found.name for found in systems] if system else (), seed=backtesting.seed,
        **backtesting.settings(note),
    )  # fmt: skip
    notes, failed, deploy = list[str](), list[str](), list[dict[str, str]]()
    whole = selection.layers is None
    if not whole:
        notes.append(f"{own.name}: no plan is written, which needs all layers: leave out --layers")
    elif folder is not None and len(placed.frames["plans"]):
        deployment = placed.deployment(model_layers, first_layer)
        deploy, failed = write_files(
            deployment, Path(folder) / f"{gpus}-gpus", [file for s in systems for file in s.files]
        )
        replicas = f", {placed.redundant:,} redundant experts" if placed.redundant else ""
        what = f"the plan for the next {asked[0]:,} steps (forecast: {placed.best}{replicas})"
        notes += _saved(what, folder, deploy, min(placed.slots) if deployment.slots == placed.slots else 0)
    placed, launch = _launched(placed, deploy)
    verdict = placed.verdict.as_row() | {"gpus": gpus}
    drawings: dict[str, Callable[..., Figure]] = {}
    if len(placed.frames["scores"]):
        drawings[f"{gpus}-gpus"] = partial(plan_course, placed.frames["scores"], placed.best)
    if len(placed.frames["knee"]):
        drawings[f"{gpus}-gpus.knee"] = partial(knee, placed.frames["knee"], verdict)
    pictures, charts = _drawn(drawings, folder)
    notes += [*launch, *charts, *(f"{own.name}: {left_out}" for left_out in placed.notes)]
    answer = alarm(placed.frames["balance"], ADVICE_BESIDE_A_PLAN) + worth(verdict).sentence
    screen = partial(
        place_screen, placed.frames["summary"], answer,
        notes=verdict_notes(verdict, files=whole), of="load" if planning.time.linear else "expert time",
    )  # fmt: skip
    return Found(
        "place", own.name, screen, placed.frames, placed, drawings, pictures, deploy,
        notes, {"horizon": asked[0], "failed": failed},
    )  # fmt: skip


def _launched(placed: Placement, deploy: Sequence[Mapping[str, str]]) -> tuple[Placement, list[str]]:
    """*placed* with the flags of the plan that was written for SGLang; how to start policies that need others."""
    flags = next((file["flags"] for file in deploy if file["system"] == "SGLang"), "")
    placed = replace(placed, verdict=placed.verdict.launched(flags))
    several = (placed.verdict.as_row(), placed.verdict.stock or {"launch": ""})
    others = [own for own in several if own["launch"] not in ("", flags)]
    return placed, [f"Policy of {own['system']} for {placed.trace}: {own['launch']}" for own in others]


@command(Selection, Backtesting)
def hot(
    trace: Traced,
    slots: int | None = None,
    *,
    total: int | None = None,
    cover: float | None = None,
    cold: int = 0,
    horizon: int | None = None,
    refresh: int | None = None,
    expert_bytes: float | None = None,
    bandwidth: float | None = None,
    model_layers: int = 0,
    first_layer: int | None = None,
    folder: str | Path | None = None,
    note: Note = silent,
    progress: Progress | None = None,
    selection: Selection,
    backtesting: Backtesting,
) -> Found[Residency]:
    """Which experts to keep in fast memory, and what they cover of what follows: ``moetrace hot``.

    The arguments are those of `residency.study.hot`; an expert of *expert_bytes* is loaded at *bandwidth* bytes per
    second. With a *folder* the sets are written there for every runtime, and ``deploy`` has their flags.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)], name="run")
    >>> len(mt.hot(trace, slots=2).sets[0])
    2
    """
    if (expert_bytes is None) != (bandwidth is None):
        raise SettingError("--expert-bytes and --bandwidth go together: give both for milliseconds")
    own, test = selection.open(trace), backtesting
    over = [horizon or default_horizon(own)]
    chosen = test.cutoffs is not None or test.every is not None or test.first is not None
    cutoffs = test.windows(own, over, over, note, "--horizon")[1] if chosen else None
    found = keep(
        own, test.predictors(QUICK), slots=slots, total=total, cover=cover, cold=cold, horizon=horizon, cutoffs=cutoffs,
        refresh=refresh, transfer=expert_bytes / bandwidth if expert_bytes and bandwidth else None, progress=progress,
        seed=test.seed, **test.settings(note),
    )  # fmt: skip
    if horizon is None and 0 < found.answer.horizon < HORIZON:
        few = f"{own.name}: {len(own.steps):,} steps are too few for sets that stay {HORIZON:,}"
        note(f"{few}: they are scored over {found.answer.horizon:,} (--horizon sets it)")
    notes, failed, deploy = list[str](), list[str](), list[dict[str, str]]()
    if folder is not None:
        sets = ResidentSets(found.sets, found.shares, model_layers).with_first_layer(first_layer)
        deploy, failed = write_files(sets, Path(folder) / "experts", RUNTIMES, "file")
        what = f"the experts to keep for the steps after the end (forecast: {found.best})"
        notes += _saved(what, folder, deploy, 0 if first_layer is not None else min(sets.sets))
    answer = found.answer.as_row()
    drawings = {
        "curve": partial(coverage, found.frames["curve"], answer["slots"]),
        "ages": partial(ages, found.frames["ages"], found.best),
    }
    pictures, charts = _drawn(drawings, folder)
    return Found(
        "hot", own.name, kept_screen(answer, found.frames), found.frames, found, drawings, pictures, deploy,
        [*notes, *charts], {"failed": failed},
    )  # fmt: skip


def _saved(what: str, folder: str | Path, written: Sequence[Mapping[str, str]], first: int) -> list[str]:
    """Lines on the files that were *written*, each with its flags; layers are numbered from *first*."""
    lines = [f"Saved {what} to {folder}:", *(f"  {file['system']}: {file['flags']}" for file in written)]
    if first:
        lines.append(
            f"  Layers are numbered from {first}, as in the trace. If your model numbers them differently, "
            "add --first-layer N."
        )
    return lines


def _drawn(drawings: Mapping[str, Callable[..., Figure]], folder: str | Path | None) -> tuple[list[str], list[str]]:
    """Write *drawings* into the *folder*, if there is one; the files, and a line on them."""
    if folder is None or not drawings:
        return [], []
    with styled():
        paths = [
            str(write_bytes(Path(folder) / f"{name}.png", picture(draw(), "png"))) for name, draw in drawings.items()
        ]
    return paths, [f"Saved the charts to {', '.join(paths)}"]
