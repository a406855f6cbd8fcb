"""The answers in words: one sentence for each question, made from the frames that hold the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moetrace.report.phrases import SAME, Answer, capitalised, count_of, listed, percent, percent_whole, points
from moetrace.report.tables import rows_of
from moetrace.report.verdict import verdict_in, worth
from moetrace.words import (
    BASELINE,
    COLLAPSED,
    DEFAULT,
    DEPLOYED,
    MODERATE,
    OK,
    ORACLE,
    SEVERE,
    SEVERITIES,
    STABLE,
    STATES,
    TRANSIENT,
    UNKNOWN,
)

if TYPE_CHECKING:
    import pandas as pd

WHILE = {STABLE: "While stable", TRANSIENT: "While transient", UNKNOWN: "Where the state is not known"}
# What the number of a card adds where it is of another state than the one that counts.
OTHERWISE = {STABLE: "", TRANSIENT: ", transient", UNKNOWN: ", state unknown"}
BASELINE_NAMED = "the mean of the last 1,000 steps"
FROM_START = "stable from the start"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


# --- is it balanced? -----------------------------------------------------------------------------------------------


# What people do about it: balancing loss (Switch Transformer, arXiv 2101.03961), bias rate (arXiv 2408.15664), router
# z-loss (ST-MoE, arXiv 2202.08906), capacity (GShard, arXiv 2006.16668).
ADVICE = {
    OK: "",
    MODERATE: "",
    SEVERE: "In training, raise the weight of the balancing loss or the bias rate, or limit the capacity of an "
    "expert; in serving, add redundant experts (moetrace place).",
    COLLAPSED: "Go back to a checkpoint before it, with a larger balancing loss or bias rate and a router z-loss.",
}


def balanced(balance: pd.DataFrame) -> Answer:
    """How bad the imbalance is now, of the worst layer first, from the frame ``balance``, one row for each layer."""
    rows = sorted(rows_of(balance), key=lambda row: (-SEVERITIES.index(row["severity"]), -row["max_over_mean"]))
    worst, idle = rows[0], int(balance["idle"].sum())
    share = f"{worst['max_over_mean']:.1f}x the mean load ({percent_whole(worst['hottest_share'])} of the tokens)"
    expert = f"expert {worst['hottest']} gets {share}"
    since = f", since step {int(worst['since']):,}" if worst["since"] == worst["since"] and worst["since"] else ""
    alike = [row["layer"] for row in rows if row["severity"] == worst["severity"]]
    others = f" So {'has' if len(alike) == 2 else 'have'} layer{'' if len(alike) == 2 else 's'} {listed(alike[1:])}."
    used = percent_whole(worst["in_use"])
    busiest = f"the busiest expert (layer {worst['layer']}, expert {worst['hottest']}) gets {share}"
    sentence = {
        OK: f"The load is balanced: {busiest}.",
        MODERATE: f"Moderate imbalance in layer {worst['layer']}: {expert}{since}.",
        SEVERE: f"Severe imbalance in layer {worst['layer']}: {expert}{since}.",
        COLLAPSED: f"The router of layer {worst['layer']} has collapsed ({used} of experts in use): {expert}{since}.",
    }[worst["severity"]]
    if worst["severity"] == COLLAPSED and len(alike) > 1:
        sentence += others
    if idle:
        sentence += f" {count_of(idle, 'expert').capitalize()} got no token at all."
    sentence = " ".join([sentence, ADVICE[worst["severity"]]]).strip()
    return Answer("Balanced?", worst["severity"], sentence, f"the last {int(balance['steps'].iloc[0]):,} steps")


def alarm(balance: pd.DataFrame) -> str:
    """The sentence about the imbalance where it is severe or the router has collapsed, before any other answer."""
    bad = set(balance["severity"]) & {SEVERE, COLLAPSED}
    return f"{balanced(balance).sentence} " if bad else ""


# --- has it settled? -----------------------------------------------------------------------------------------------


def settled(layers: pd.DataFrame) -> Answer:
    """Since when the layers are stable, from the frame ``layers``."""
    n, done = len(layers), layers[layers["state"] == STABLE]
    told = layers[layers["state"] != UNKNOWN]
    parts = [_settled_sentence(done, n), *_not_settled(layers)] if len(told) else [_untold(n)]
    agree = int((told["detectors"] == "agree").sum())
    evidence = f"the order of the experts agrees in {agree} of {len(told)} layers" if len(told) else ""
    settling = done[done["outcome"] != FROM_START]
    if len(settling) and settling["settle_step"].notna().any():
        evidence = f"{_interval_of(_latest(settling))}; {evidence}"
    return Answer("Settled?", f"{len(done)} of {n} layers", " ".join(part for part in parts if part), evidence)


def _settled_sentence(done: pd.DataFrame, n: int) -> str:
    if done.empty:
        return f"None of {n} layers is stable at the end." if n > 1 else "The only layer is not stable at the end."
    count = _stable_layers(len(done), n)
    from_start = done["outcome"] == FROM_START
    if from_start.all():
        return f"{count} stable from the start."
    last = _latest(done)
    rest = done[(done["layer"] != last["layer"]) & ~from_start]
    sentence = f"{count} stable at the end"
    if rest.empty:
        return f"{sentence}: layer {last['layer']} settles {_when(last)}."
    by = int(rest["settle_step"].max())
    if by == last["settle_step"]:
        who = _in_words(len(rest) + 1) if from_start.any() else "both" if len(done) == 2 else "all"
        return f"{sentence}: {who} settle by {by:,}{_gradually(last)}."
    alone = f"layer {rest['layer'].iloc[0]} settles at"
    others = alone if len(rest) == 1 else f"{_in_words(len(rest))} settle by"
    return f"{sentence}: {others} {by:,}, layer {last['layer']} {_when(last)}."


def _stable_layers(done: int, n: int) -> str:
    """``All 3 layers are``, ``One of 3 layers is``: the subject of the sentence, and its verb."""
    if done == n:
        return {1: "The only layer is", 2: "Both layers are"}.get(n, f"All {n} layers are")
    return f"{capitalised(_in_words(done))} of {n} layers {'is' if done == 1 else 'are'}"


def _untold(n: int) -> str:
    which = "the only layer is" if n == 1 else f"any of the {n} layers is"
    return f"Whether {which} stable cannot be told: too few rows, or rows too far apart."


def _latest(done: pd.DataFrame) -> dict[str, Any]:
    return max(rows_of(done), key=lambda layer: layer["settle_step"])


def _when(layer: dict[str, Any]) -> str:
    return f"at {int(layer['settle_step']):,}{_gradually(layer)}"


def _gradually(layer: dict[str, Any]) -> str:
    """That the step is only one of many where the interval is wide."""
    low, high = int(layer["settle_step_low"]), int(layer["settle_step_high"])
    return f", but gradually: anywhere from {low:,} to {high:,}" if high - low > 2 * 1000 else ""


def _interval_of(layer: dict[str, Any]) -> str:
    low, high = int(layer["settle_step_low"]), int(layer["settle_step_high"])
    return f"layer {layer['layer']} between {low:,} and {high:,}"


def _not_settled(layers: pd.DataFrame) -> list[str]:
    """What is said of the layers that are not stable at the end."""
    moving = layers[layers["state"] == TRANSIENT]
    again = moving[moving["outcome"] == "unsettled again"]
    never = moving[moving["outcome"] != "unsettled again"]
    unknown = layers[layers["state"] == UNKNOWN]
    said = []
    if len(never):
        said.append(f"{_layers_named(never, layers)} never {'settles' if len(never) == 1 else 'settle'}.")
    if len(again):
        by = int(again["unsettled_step_high"].astype(float).max())
        said.append(f"{_layers_named(again, layers)} settled, then became unstable again by step {by:,}.")
    if len(unknown):
        which = _layers_named(unknown, layers).lower()
        said.append(f"Of {which} it cannot be told: too few rows, or rows too far apart.")
    return said


def _layers_named(some: pd.DataFrame, layers: pd.DataFrame) -> str:
    """*some* of the *layers* by their numbers."""
    if len(some) == len(layers) > 1:
        return "All"
    return f"Layer{'' if len(some) == 1 else 's'} {listed(some['layer'].tolist())}"


def _in_words(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else f"{number:,}"


# --- can it be predicted? ------------------------------------------------------------------------------------------


def predictable(summary: pd.DataFrame, horizon: int) -> Answer:
    """How well the load of the next *horizon* steps was known, from the frame ``summary``: best beside baseline.

    Of scored cutoffs only; where none was scored, it says so. The best is the one with the lowest mean error.
    """
    own = summary[(summary["horizon"] == horizon) & (summary["scored"] > 0)]
    parts = {state: own[own["state"] == state] for state in STATES}
    parts = {state: rows for state, rows in parts.items() if len(rows)}
    if not parts:
        return Answer("Predictable?", "not measured", f"Not measured: {_why_not(summary, horizon)}.")
    sentence = " ".join(_state_sentence(state, rows) for state, rows in parts.items())
    if STABLE not in parts:
        sentence += " Nothing was scored while stable."
    first = next(iter(parts))
    best = best_of(parts[first])
    scored = " and ".join(f"{int(rows['scored'].max()):,} {state}" for state, rows in parts.items())
    covered = " and ".join(f"{percent_whole(best_of(rows)['coverage_80'])} of {state}" for state, rows in parts.items())
    evidence = f"{scored} scores; 80% intervals held the load in {covered} cases"
    return Answer("Predictable?", f"{percent(best['error_rate'])} wrong{OTHERWISE[first]}", sentence, evidence)


def _why_not(summary: pd.DataFrame, horizon: int) -> str:
    """What kept every forecast of the next *horizon* steps from being scored."""
    own = summary[summary["horizon"] == horizon]
    if own["too_short"].sum():
        return "before every cutoff there is less history than any of the predictors needs"
    return f"no cutoff of this trace can be scored {horizon:,} steps ahead"


def expected(ahead: pd.DataFrame, summary: pd.DataFrame, horizon: int) -> str:
    """What the best predictor expects of its forecast of the steps to come, from its rows in *ahead*, one a layer."""
    scored = summary[(summary["horizon"] == horizon) & (summary["scored"] > 0)]
    first = next((state for state in STATES if (scored["state"] == state).any()), None)
    best = str(best_of(scored[scored["state"] == first])["predictor"]) if first else str(ahead["predictor"].iloc[0])
    error = ahead.loc[ahead["predictor"] == best, "expected_error"].astype(float).mean()
    if error != error:
        return ""
    return f"Of the next {horizon:,} steps {best} expects to be {percent(error)} wrong."


def best_of(rows: pd.DataFrame) -> dict[str, Any]:
    """The row of the lowest mean error."""
    return min(rows_of(rows), key=lambda row: row["error_rate"])


def _state_sentence(state: str, rows: pd.DataFrame) -> str:
    best = best_of(rows)
    baseline = best["error_rate"] - best["difference"]
    noise = f"noise {percent(best['error_noise'])}" if best["error_noise"] == best["error_noise"] else "noise not known"
    said = WHILE[state]
    if len(rows) == 1 and best["predictor"] != BASELINE:
        apart = points(best["difference"], best["difference_low"], best["difference_high"])
        beside = f"{apart} {'as' if apart == SAME else 'beside'} {BASELINE_NAMED}"
        return f"{said}, {best['predictor']} is {percent(best['error_rate'])} wrong ({noise}): {beside}."
    better = rows[rows["difference_high"] < 0]
    if better.empty:
        if len(rows) == 1:
            return f"{said}, {BASELINE_NAMED} is {percent(baseline)} wrong ({noise})."
        if rows["difference_low"].isna()[rows["predictor"] != BASELINE].all():
            return f"{said}, {_too_few(best, baseline, noise)}."
        return f"{said}, nothing clearly beats {BASELINE_NAMED} ({percent(baseline)} wrong; {noise})."
    best = best_of(better)
    return (
        f"{said}, {best['predictor']} is clearly better than {BASELINE_NAMED}: {percent(best['error_rate'])} wrong "
        f"where that is {percent(best['error_rate'] - best['difference'])} ({noise})."
    )


def _too_few(best: dict[str, Any], baseline: float, noise: str) -> str:
    """That there are no intervals of the differences, and what the lowest mean error is."""
    wrong = f"{percent(baseline)} wrong; {noise}"
    lowest = "" if best["predictor"] == BASELINE else f"; {best['predictor']} was {percent(best['error_rate'])} wrong"
    return f"too few cutoffs were scored to tell what beats {BASELINE_NAMED} ({wrong}){lowest}"


# --- is balancing worth it? ----------------------------------------------------------------------------------------


def plan_peaks(summary: pd.DataFrame) -> dict[str, float]:
    """The mean load of the busiest GPU by strategy, over all states."""
    return {row["strategy"]: row["peak_over_mean"] for row in rows_of(summary) if row["state"] == "all"}


def best_plan(peaks: Mapping[str, float]) -> str:
    """The strategy of the lowest of the *peaks*, of those that plan by a forecast."""
    return min((name for name in peaks if name not in (DEFAULT, DEPLOYED, ORACLE)), key=lambda name: peaks[name])


def answers_of(frames: Mapping[str, pd.DataFrame]) -> list[Answer]:
    """The four answers on one trace, in the order of the cards, from the frames of a study."""
    trace = str(frames["layers"]["trace"].iloc[0])
    horizons = sorted(frames["summary"]["horizon"].unique()) if len(frames["summary"]) else [1000]
    return [
        balanced(frames["balance"]),
        settled(frames["layers"]),
        predictable(frames["summary"], int(horizons[0])),
        worth(verdict_in(frames), f"moetrace place {trace} --gpus N"),
    ]
