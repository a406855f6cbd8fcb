"""What is said and drawn of resident sets: which experts to keep in fast memory, for how long, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moetrace.reporting.phrases import Answer, percent
from moetrace.reporting.style import BLUE, FAINT, GREEN, GREY, INK, STATE, name_at_ends, one_legend, one_panel
from moetrace.reporting.tables import rows_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION = "Which experts to keep?"
# Above this part of the experts, nearly all of them are active in a step.
NEARLY_ALL = 0.9
METHODS = {
    "refreshed": "set refreshed every {refresh:,} steps",
    "lru": "LRU cache",
    "lfu": "LFU cache",
    "oracle_static": "best set in hindsight",
    "oracle": "cache with perfect foresight",
}
ORDER = "Caches are replayed by the experts active in each step, because the order of its tokens is unknown."
ELSEWHERE = "An expert that is cold in this trace may be one that another workload needs: record that workload, too."


def kept(answer: Mapping[str, Any]) -> Answer:
    """The answer of a row of ``answer`` of ``hot --json``."""
    per_layer, experts, layers = answer["slots"], answer["experts"], answer["layers"]
    what = f"{per_layer:,.0f} of {experts:,} experts per layer"
    if answer["allocation"] == "by_load":
        what = f"{per_layer * layers:,.0f} of {experts * layers:,} experts, divided over the layers by load,"
    active = f"{percent(answer['active_hit_rate'], 1)} of the experts active in a step"
    tokens = f"{answer['tokens']:,.0f}" if answer["tokens"] >= 2 else f"{answer['tokens']:.2g}"
    nearly = answer["active"] > NEARLY_ALL * experts
    why = f": with {tokens} tokens per expert and step, nearly all experts are active" if nearly else ""
    missed = answer["active"] * (1 - answer["active_hit_rate"])
    worth = {
        "untested": " of this trace. Not tested: it has too few steps, or steps too far apart, to score a set on what "
        "followed.",
        "unknown": f" and {active}. Not enough evidence for a verdict: record more steps.",
        "cache": f" and {active}. An LRU cache of that size has {percent(answer['lru'], 1)} of them: the hot experts "
        "change too fast for a fixed set.",
        "neither": f" and {active}; as many experts taken at random would cover {percent(per_layer / experts, 1)}. "
        "Not worth it: no experts are hot enough.",
        "compute": f", but only {active}{why}. Worth it if a CPU computes the other experts, not if they are loaded.",
        "loading": f" and {active}. Worth it: a step loads {missed:,.1f} instead of {answer['active']:,.1f} experts "
        "per layer.",
    }[answer["worth"]]
    covers = f"{percent(answer['hit_rate'], 1)} of token choices"
    sentence = f"Keeping {what} covers {covers}{interval_of(answer, ' (95% interval {:.1f} to {:.1f}%)')}{worth}"
    number = f"{percent(answer['hit_rate'], 0)} of token choices"
    return Answer(QUESTION, number, sentence, fine=answer["worth"] in ("neither", "unknown", "untested"))


def kept_notes(answer: Mapping[str, Any], cold: pd.DataFrame, curve: pd.DataFrame) -> list[str]:
    """What stands below the table, a paragraph each: knee, how long a set holds, what more would gain, what is left."""
    knee = (
        f"About {answer['above_mean']:,} experts per layer get more than the mean load; each further slot covers less "
        "than an average expert gets."
    )
    if answer["worth"] == "untested":
        return [knee, *([ELSEWHERE] if len(cold) else [])]
    notes = [f"{knee} {lasting(answer)}"]
    gains = [f"{100 * answer['refresh_adds']:+z.1f} points by a set chosen anew every {answer['refresh']:,} steps"]
    gains.append(f"{100 * answer['lru_adds']:+z.1f} by an LRU cache")
    if answer["by_load_adds"] is not None:
        gains.append(f"{100 * answer['by_load_adds']:+z.1f} by as many slots, divided unequally over the layers")
    notes.append(f"Token choices covered, compared with this set: {', '.join(gains)}.")
    left = max(0.0, answer["hindsight"] - answer["hit_rate"])
    notes.append(
        f"The best set in hindsight covers {percent(answer['hindsight'], 1)}, so that a better forecast can "
        f"gain at most {100 * left:.1f} points. Of the active experts, an LRU cache holds {percent(answer['lru'], 1)}, "
        f"a cache with perfect foresight {percent(answer['oracle'], 1)}."
    )
    if answer["tokens"] * answer["experts"] > answer["active"]:
        notes.append(ORDER)
    if len(cold):
        number = int(cold.groupby("layer").size().iloc[0])
        (row,) = rows_of(curve[curve["slots"] == answer["experts"] - number])
        cost, worst = percent(1 - row["hit_rate"], 1), percent(1 - row["worst_layer"], 1)
        notes.append(
            f"Removing the {number:,} coldest experts of every layer would have cost {cost} of the token choices that "
            f"followed, {worst} in the worst layer. {ELSEWHERE}"
        )
    return notes


def lasting(answer: Mapping[str, Any]) -> str:
    """For how long a set is as good as a new one."""
    when = "" if answer["ends"] == "unknown" else f" chosen while the load is {answer['ends']}"
    holds = answer["holds"] or answer["reach"]
    end = "" if answer["holds"] else ", as far as the trace shows"
    return f"A set{when} covers at most 1 point less than a new one for {holds:,} steps{end}."


def interval_of(row: Mapping[str, Any], form: str) -> str:
    """The 95% interval of the hit rate in that *form*, where it is known."""
    low, high = row["hit_rate_low"], row["hit_rate_high"]
    return form.format(100 * low, 100 * high) if low == low else ""


# --- figures -------------------------------------------------------------------------------------------------------


def coverage(curve: pd.DataFrame, slots: float, axes: Axes | None = None) -> Figure:
    """Token choices covered by the number of resident experts per layer, and active experts; *slots* are asked for."""
    figure, axes = one_panel(8.6, 3.2, axes)
    lines = {
        "hindsight": (GREEN, "best set in hindsight"), "hit_rate": (BLUE, "token choices, mean of the layers"),
        "median_layer": (INK, "median layer"), "worst_layer": (GREY, "worst layer"),
        "active_hit_rate": (FAINT, "active experts"),
    }  # fmt: skip
    for name, (colour, label) in lines.items():
        axes.plot(curve["slots"], 100 * curve[name], color=colour, label=label)
    axes.axvline(slots, color=FAINT, linewidth=0.8)
    axes.set(xlabel="resident experts per layer", ylabel="covered (%)", xlim=(0, curve["slots"].max()), ylim=(0, 101))
    axes.grid(visible=True)
    one_legend(figure, axes)
    return figure


def ages(frame: pd.DataFrame, best: str, axes: Axes | None = None) -> Figure:
    """What a set by *best* covers less than a new one by its age, for each state that it was chosen in."""
    figure, axes = one_panel(8.6, 2.6, axes)
    if frame.empty:
        axes.annotate("too short to tell", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=8)
    for state, own in frame[frame["method"] == best].groupby("state", sort=False):
        label = "all sets" if state == "all" else f"chosen while {state}"
        axes.plot(
            own["age"], 100 * own["lost"], color=INK if state == "all" else STATE[str(state)], marker=".", label=label
        )
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="steps since the set was chosen", ylabel="points less than a new set")
    axes.grid(visible=True)
    name_at_ends(figure, axes)
    return figure
