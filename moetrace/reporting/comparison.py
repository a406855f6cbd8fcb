"""What is said of two traces: how far apart they are, and whether the plan and the set of one serve the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moetrace.reporting.phrases import NOTHING, percent
from moetrace.reporting.screens import MOST_ROWS, Screen, table_screen
from moetrace.reporting.tables import rows_of

if TYPE_CHECKING:
    import pandas as pd

# What a plan or a set may lose before another one is worth making.
WORTH = 0.01


def distance_sentence(row: Mapping[str, Any]) -> str:
    """How far apart the loads are, and in what: of a row of ``comparisons``, or of ``compare --json``."""
    a, b, apart = row["a"], row["b"], percent(row["distance"])
    noise = f"two samples of one load would differ by {percent(row['noise'])}"
    if row["same"] is None:
        return f"The loads of {a} and {b} differ by {apart} of the token choices; noise floor unknown (too few steps)."
    if row["same"]:
        return (
            f"The loads of {a} and {b} are the same within the noise floor: they differ by {apart} of the token "
            f"choices; {noise}."
        )
    sentence = f"The loads of {a} and {b} differ by {apart} of the token choices; {noise}."
    by_rank = f"by rank, the shares differ by {percent(row['sorted_distance'])}"
    return (
        sentence
        + {
            "same": "",
            "permuted": f" The experts are in another order: {by_rank}, which is noise.",
            "different": f" Expert numbers mean different experts in each, as with two seeds; {by_rank}.",
            "unknown": f" Whether expert numbers mean the same in both is unknown; {by_rank}.",
        }[row["order"]]
    )


def plan_sentence(document: Mapping[str, Any]) -> list[str]:
    """What the plan of one trace costs on the other, and which to use; empty where no GPUs were given."""
    found, a, b = document["transfer"], document["a"], document["b"]
    if found.get("slower_than_own") is None:
        return []
    own, default = found["slower_than_own"], found["slower_than_default"]
    (pace, than), (beside, default_than) = map(_pace, (own, default))
    sentence = f"A plan from {a} is {pace} on {b} {than} its own plan and {beside} {default_than} none:"
    gain = 1 - (1 + default) / (1 + own)  # what its own plan saves
    if gain < WORTH:
        advice = f"the plan of {b} saves only {percent(max(gain, 0.0))}: leave the default placement."
    elif own <= WORTH:
        advice = "it transfers."
    elif default < -WORTH:
        advice = f"it still helps, but make it from {b} if you can."
    else:
        advice = f"make it from {b}."
    return [f"{sentence} {advice}"]


def _pace(slower: float) -> tuple[str, str]:
    """How fast, and the word before what it is compared with."""
    if abs(slower) < 0.0005:
        return "as fast", "as"
    return f"{percent(abs(slower), 1)} {'slower' if slower > 0 else 'faster'}", "than"


def set_sentence(document: Mapping[str, Any]) -> list[str]:
    """What the resident set of one trace covers of the other; empty where no slots were given."""
    found, a, b = document["transfer"], document["a"], document["b"]
    if found.get("hit_rate") is None:
        return []
    hit, own = found["hit_rate"], found["own_hit_rate"]
    advice = "it transfers" if own - hit <= WORTH else f"choose it from {b}"
    covers = f"covers {100 * hit:.1f}% of the token choices of {b}, its own set {100 * own:.1f}%"
    return [f"A set of {found['slots']:,} experts per layer from {a} {covers}: {advice}."]


def comparison_notes(document: Mapping[str, Any]) -> list[str]:
    """What stands below the table: intervals, the other end where the hardware is not known, and how it was scored."""
    found, a, b, notes = document["transfer"], document["a"], document["b"], []
    if found.get("slower_than_own") is not None:
        ends = [_change(found[f"slower_than_{name}_{end}"]) for name in ("own", "default") for end in ("low", "high")]
        notes = [
            f"Expert time per step on {found['gpus']} GPUs, 95% intervals: {ends[0]} to {ends[1]} compared with its "
            f"own plan, {ends[2]} to {ends[3]} compared with none."
        ]
        bound = [found[f"slower_than_{name}_memory_bound"] for name in ("own", "default")]
        if bound[0] is not None:
            notes[0] += (
                " That is where expert time is proportional to tokens; where experts are memory-bound, "
                f"{_change(bound[0])} and {_change(bound[1])}: add --hardware."
            )
    if found.get("hit_rate") is not None:
        notes.append(
            f"Experts taken at random would cover {100 * found['random_hit_rate']:.1f}%, the best set in hindsight "
            f"{100 * found['best_hit_rate']:.1f}%."
        )
    if found:
        notes.append(
            f"Scored on steps {found['from_step']:,} to {found['to_step']:,} of {b}. Its own plan or set is made from "
            f"the 1,000 steps before these, and that of {a} from its last 1,000 steps, or all if it has fewer."
        )
    return notes


def _change(slower: float) -> str:
    return f"{100 * slower:+z.1f}%"


def comparison_screen(document: Mapping[str, Any], layers: pd.DataFrame, *, every: bool) -> Screen:
    """The answer and a row for each layer; of many layers those that differ most."""
    shown = layers
    if not every and len(layers) > MOST_ROWS:
        shown = layers.sort_values("distance", ascending=False, kind="stable")
    rows = [
        {
            "layer": str(row["layer"]),
            "differs by": percent(row["distance"], 2),
            "noise floor": percent(row["noise"], 2),
            "halves of one": percent(row["halves"], 2),
            "by rank": percent(row["sorted_distance"], 2),
            "rank correlation": f"{row['rank_correlation']:.2f}".replace("nan", NOTHING),
            f"top {document['top']} in common": f"{100 * row['overlap']:.0f}%",
        }
        for row in rows_of(shown)
    ]
    apart, asked = distance_sentence(document), [*plan_sentence(document), *set_sentence(document)]
    notes = [*([apart] if asked else []), *comparison_notes(document)]
    return table_screen(" ".join(asked) or apart, rows, every=every, notes=notes)
