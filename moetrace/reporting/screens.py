"""What a command shows first: its answer in a sentence, and one table that a terminal of 100 columns holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetrace.reporting.answers import FROM_START, alarm, answers_of, balanced, expected, predictable, settled
from moetrace.reporting.phrases import NOTHING, bytes_of, capitalised, count_of, listed, percent, points
from moetrace.reporting.residency import METHODS, interval_of, kept, kept_notes
from moetrace.reporting.tables import rows_of
from moetrace.words import BASELINE, COLLAPSED, DEFAULT, DEPLOYED, ORACLE, SEVERE, SEVERITIES, STABLE, STATES, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

# Rows of a table on sight; `--all` shows the rest.
MOST_ROWS = 12


@dataclass(frozen=True)
class Screen:
    """A *sentence*, a table of *columns*, each a heading and its cells, and *notes* below it.

    *words* are the columns that are aligned to the left, the first is always one of them; *hidden* rows were left out.
    """

    sentence: str
    columns: Sequence[tuple[str, Sequence[str]]] = ()
    words: Sequence[str] = ()
    hidden: int = 0
    notes: Sequence[str] = ()


def rendered(screen: Screen, *, ascii_only: bool = False) -> list[Any]:
    """The screen as rich shows it; a text may hold [brackets], which mean nothing here."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(screen.sentence, style="bold")] if screen.sentence else []
    if screen.columns:
        style = box.ASCII2 if ascii_only else box.SIMPLE_HEAD
        table = Table(box=style, show_edge=False, pad_edge=True, header_style="dim")
        for i, (heading, _) in enumerate(screen.columns):
            left = i == 0 or heading in screen.words
            table.add_column(
                Text(heading), justify="left" if left else "right", no_wrap=heading not in FOLDED, overflow="fold"
            )
        for row in zip(*(cells for _, cells in screen.columns)):
            table.add_row(*map(Text, row))
        parts += ["", table] if parts else [table]
    if screen.hidden:
        parts.append(Text(f" {screen.hidden:,} more: --all", style="dim"))
    parts += [Text(note) for note in screen.notes]
    return [*parts, ""]


# Columns whose texts may take more than one line; where a name is long, no number beside it is cut short.
FOLDED = ("trace", "evidence", "findings", "answer", "settings", "needs")


def table_screen(
    sentence: str, rows: Sequence[dict[str, str]], words: Sequence[str] = (), *, every: bool, notes: Sequence[str] = ()
) -> Screen:
    """A screen of *rows*, each a text by heading, the first `MOST_ROWS` of them unless *every* is asked for."""
    kept = rows if every else rows[:MOST_ROWS]
    columns = [(heading, [row[heading] for row in kept]) for heading in rows[0]] if rows else []
    return Screen(sentence, columns, words, len(rows) - len(kept), notes)


def _number(value: Any) -> str:
    import pandas as pd

    return NOTHING if pd.isna(value) else f"{int(value):,}"


# --- traces --------------------------------------------------------------------------------------------------------


def traces_screen(traces: pd.DataFrame, sentence: str, *, every: bool) -> Screen:
    """What a workspace holds, or an ingest read, from a traces frame."""
    rows = [
        {
            "trace": trace["trace"],
            "steps": f"{trace['first_step']:,}-{trace['last_step']:,}",
            "layers": f"{trace['layers']:,}",
            "experts": f"{trace['experts']:,}",
            "tokens/step": _number(trace["tokens_per_step"]),
            "format": trace["format"],
            "imbalance": trace["imbalance"],
            "findings": trace["findings"] or "none",
        }
        for trace in rows_of(traces)
    ]
    return table_screen(sentence, rows, ("format", "imbalance", "findings"), every=every)


def _imbalanced(traces: pd.DataFrame) -> str:
    """Which traces have a severe imbalance or a collapsed router, the worst first."""
    found = []
    for severity, what in ((COLLAPSED, "The router has collapsed"), (SEVERE, "Severe imbalance")):
        names = traces[traces["imbalance"].str.startswith(severity)]["trace"].tolist()
        found += [f" {what} in {listed(names)}: run moetrace states to see the experts."] if names else []
    return "".join(found)


def ingested_sentence(traces: pd.DataFrame, unchanged: int) -> str:
    """What an ingest read, and whether it found problems in the logs."""
    read = len(traces) - unchanged
    parts = [f"Imported {count_of(read, 'trace')}"] if read else []
    if unchanged:
        parts.append(f"{count_of(unchanged, 'trace')} already imported, unchanged")
    found = traces[traces["findings"] != ""]["trace"].tolist()
    health = f"Findings in {listed(found)}." if found else "No problems in the logs."
    return f"{', '.join(parts)}. {health}{_imbalanced(traces)}"


def listed_sentence(traces: pd.DataFrame, workspace: str) -> str:
    """What a workspace holds."""
    if not len(traces):
        return f"No trace in {workspace}."
    return f"{count_of(len(traces), 'trace')} in {workspace}.{_imbalanced(traces)}"


def findings_screen(findings: pd.DataFrame, traces: int, *, every: bool) -> Screen:
    """What the doctor found, from a findings frame, in so many *traces*."""
    worst = findings["severity"].tolist() if len(findings) else []
    what = [f"{count_of(worst.count(kind), kind)}" for kind in ("error", "warning", "note") if kind in worst]
    sentence = f"Examined {count_of(traces, 'trace')}: {', '.join(what) or 'no problems found'}."
    rows = [
        {name: str(row[name]) for name in ("trace", "severity", "name", "place", "evidence")}
        for row in rows_of(findings)
    ]
    return table_screen(sentence, rows, ("severity", "name", "place", "evidence"), every=every)


# --- states --------------------------------------------------------------------------------------------------------


def states_screen(layers: pd.DataFrame, *, every: bool) -> Screen:
    """When each layer of one trace became stable.

    Of many layers the most unbalanced come first, then unsettled ones, then where detectors differ, then the latest.
    """
    trace, shown = str(layers["trace"].iloc[0]), layers
    if len(layers) > MOST_ROWS and not every:
        late, bad = -layers["settle_step"].astype("Float64").fillna(0), layers["severity"].map(SEVERITIES.index)
        by = layers.assign(bad=-bad, done=layers["state"] == STABLE, agree=layers["detectors"] == "agree", late=late)
        shown = by.sort_values(["bad", "done", "agree", "late"], kind="stable")
    rows = [layer_cells(layer) for layer in rows_of(shown)]
    sentence = f"{trace}: {balanced(layers.assign(steps=1000)).sentence} {settled(layers).sentence}"
    return table_screen(sentence, rows, ("imbalance", "ranks"), every=every)


def layer_cells(layer: dict[str, Any]) -> dict[str, str]:
    """What is said of one layer, a row of a layers frame."""
    between, change = NOTHING, percent(layer["movement_before"], 1)
    if layer["state"] == STABLE:
        change += f" -> {percent(layer['movement_after'], 1)}"
        settles = "from the start"
        if layer["outcome"] != FROM_START:
            settles = _number(layer["settle_step"])
            between = f"{_number(layer['settle_step_low'])} - {_number(layer['settle_step_high'])}"
    elif layer["state"] == UNKNOWN:
        settles = "unknown"
    else:
        again = layer["outcome"] == "unsettled again"
        settles = f"unstable since {_number(layer['unsettled_step'])}" if again else "never"
    return {
        "layer": str(layer["layer"]),
        "imbalance": layer["severity"],
        "busiest": f"{layer['hottest']}: {layer['max_over_mean']:.1f}x",
        "idle": _number(layer["idle"]),
        "settles": settles,
        "between": between,
        "change": change,
        "ranks": layer["detectors"] if layer["state"] != UNKNOWN else NOTHING,
    }


# --- predictions ---------------------------------------------------------------------------------------------------


def predict_screen(
    summary: pd.DataFrame,
    horizon: int,
    ahead: pd.DataFrame | None = None,
    balance: pd.DataFrame | None = None,
    *,
    every: bool,
) -> Screen:
    """How wrong each predictor was at one horizon of one trace, the best first, beside the baseline.

    A severe imbalance in *balance* comes first. *ahead* has what each expects of the steps to come, a row for each
    predictor and layer.
    """
    own = summary[summary["horizon"] == horizon]
    scored = own[own["scored"] > 0]
    states = [state for state in STATES if (scored["state"] == state).any()]
    answer = predictable(own, horizon)
    sentence = f"{own['trace'].iloc[0]}: {'' if balance is None else alarm(balance)}{answer.sentence}"
    if not states:
        return Screen(sentence)
    by_state = {state: {row["predictor"]: row for row in rows_of(scored[scored["state"] == state])} for state in states}
    first = by_state[states[0]]
    names = sorted(
        own["predictor"].unique(), key=lambda name: first[name]["error_rate"] if name in first else float("inf")
    )
    kept = [str(name) for name in (names if every else names[:MOST_ROWS])]
    columns = [("predictor", kept)]
    for state, rows in by_state.items():
        errors = [percent(rows[name]["error_rate"]) if name in rows else "too short" for name in kept]
        apart = [
            NOTHING if name not in rows else "(baseline)" if name == BASELINE
            else points(*(rows[name][f"difference{end}"] for end in ("", "_low", "_high")))
            for name in kept
        ]  # fmt: skip
        columns += [(state, errors), (f"vs {BASELINE}", apart)]
    notes = [f"{capitalised(answer.evidence)}."]
    notes += [expected(ahead, own, horizon)] if ahead is not None and len(ahead) else []
    return Screen(sentence, columns, hidden=len(names) - len(kept), notes=notes)


# --- placement -----------------------------------------------------------------------------------------------------


def place_screen(
    summary: pd.DataFrame, sentence: str, *, every: bool, notes: Sequence[str] = (), of: str = "load"
) -> Screen:
    """What plans by each forecast leave of the imbalance of one trace, by state; *of* is load, or time."""
    names = {DEFAULT: "default placement", DEPLOYED: "deployed plan", ORACLE: "perfect forecast (oracle)"}
    states = [state for state in STATES if state in set(summary["state"])]
    by_state = {state: summary[summary["state"] == state].set_index("strategy") for state in states}
    titles = {state: "state unknown" if state == UNKNOWN else state for state in states}
    strategies = sorted(
        summary["strategy"].unique(), key=lambda name: (name != DEFAULT, name != DEPLOYED, name == ORACLE, name)
    )
    rows = [
        {"plan by": names.get(name, str(name))}
        | {titles[state]: _peak(rows, name, "peak_over_mean") for state, rows in by_state.items()}
        | {f"moved, {titles[state]}": _peak(rows, name, "moved") for state, rows in by_state.items()}
        for name in strategies
    ]
    if rows and states:
        first = rows[0][titles[states[0]]]
        legend = (
            f"{first}: over the {int(summary['horizon'].iloc[0]):,} steps after a plan, the busiest GPU has "
            f"{first.removesuffix('x')} times the mean {of} of all GPUs. Moved: the share of slots that a new plan "
            "gives to another expert."
        )
        if UNKNOWN in states:
            legend += " State unknown: too few earlier steps to judge that layer."
        notes = [legend, *notes]
    trace = f"{summary['trace'].iloc[0]}: " if len(summary) else ""
    return table_screen(f"{trace}{sentence}", rows, every=every, notes=notes)


def _peak(rows: pd.DataFrame, name: str, measure: str) -> str:
    value = rows[measure].get(name)
    if value is None or value != value:
        return NOTHING
    if measure != "moved":
        return f"{value:.2f}x"
    size = rows["moved_bytes"].get(name) if "moved_bytes" in rows else None
    return percent(value, 0) + (f", {bytes_of(size)}" if size is not None and size == size else "")


# --- report --------------------------------------------------------------------------------------------------------


def report_screen(trace: str, frames: Mapping[str, pd.DataFrame]) -> Screen:
    """The answers that the cards of the page give on one trace."""
    answers = answers_of(frames)
    columns = [("question", [a.question for a in answers]), ("answer", [a.sentence for a in answers])]
    return Screen(trace, columns, words=["answer"])


def kept_screen(answer: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> Screen:
    """The answer, and what each method covers: the sets by forecasts, best first, then caches and oracles."""
    names = list(METHODS)
    equal = max(1, int(answer["slots"]))
    rows = sorted(
        (
            row
            for row in rows_of(frames["summary"])
            if row["state"] == "all" and (row["allocation"] == "by_load" or row["slots"] == equal)
        ),
        key=lambda row: (names.index(row["method"]) if row["method"] in METHODS else -1, -row["hit_rate"]),
    )
    cells = [
        {
            "experts kept": METHODS.get(row["method"], f"set by {row['method']}").format(**answer)
            + (", unequal slots" if row["allocation"] == "by_load" else ""),
            "token choices": percent(row["hit_rate"], 1) + interval_of(row, " [{:.1f}, {:.1f}]"),
            "active experts": percent(row["active_hit_rate"], 1),
            "loads/step, layer": f"{row['loads']:,.1f}",
        }
        | ({"ms/step": f"{row['ms_per_step']:,.3g}"} if row["ms_per_step"] == row["ms_per_step"] else {})
        for row in rows
    ]
    notes = kept_notes(answer, frames["cold"], frames["curve"])
    return table_screen(f"{answer['trace']}: {kept(answer).sentence}", cells, every=True, notes=notes)
