"""Frames about how often to plan: plans made every so many steps, on the same load as plans made less often."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from moetrace.forecasting.backtest import Backtest
from moetrace.forecasting.summary import DIFFERENCE, summarise
from moetrace.placement.planning import ByNode, Planning
from moetrace.placement.simulate import IN_ORDER, Strategies, forecasts_of
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

REPLANNING_COLUMNS = (
    "trace", "layer", "strategy", "replan_every", "cutoff", "state", "peak_over_mean", "balance",
    *ByNode._fields, "moved",
)  # fmt: skip
# A plan is as good as one made more often if the busiest GPU takes at most so much of the mean load more.
ENOUGH = 0.01


def replanning_frame(trace: LoadTrace, test: Backtest, gpus: int, redundant: int = 0, **settings: Any) -> pd.DataFrame:
    """One row per layer, strategy, distance of the plans and stretch of the shortest distance after each *cutoff*.

    *test* was made at the cutoffs of `replanning_windows`; its horizons are the distances. A plan holds
    until the next one; *replan_every* is empty for the one made at the first cutoff, for the longest
    horizon, and kept to the end. The strategies are those of `simulate`; one without a forecast
    goes on with the plan it has, experts in their order at first. *state* is the layer's when the plan
    was made, which is what one knows who decides how long it shall hold. *moved* is the part of the slots
    that a plan changes, empty where none is made and at the first cutoff, from which all begin.
    The other *settings* are those of `Planning`; the plans of the oracle are as even as can be.
    Raises `SettingError` where the slots do not fill the *gpus* evenly.

    >>> import moetrace as mt
    >>> from moetrace.forecasting.windows import replanning_windows
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.Level()], [500, 1000], replanning_windows(trace, [500, 1000]))
    >>> frame = mt.replanning_frame(trace, test, gpus=4)
    >>> sorted(frame["replan_every"].dropna().unique().tolist())
    [500, 1000]
    """
    import pandas as pd

    planning = Planning(gpus, redundant, **settings)
    planning.check(trace.experts)
    rows = [
        {"trace": trace.name, "layer": layer} | row
        for layer in (trace.layers if len(test.shares) else ())
        for row in _replanned(
            Strategies(trace.layer(layer), forecasts_of(test, layer), planning), test, trace.info.top_k
        )
    ]
    return pd.DataFrame(rows, columns=REPLANNING_COLUMNS).astype({"replan_every": "Int64"})


def _replanned(known: Strategies, test: Backtest, top_k: int | None) -> Iterator[dict[str, Any]]:
    """The rows of one layer, where a token takes *top_k* experts."""
    own = test.scores[test.scores["layer"] == known.load.layer]
    states = own.drop_duplicates("cutoff").set_index("cutoff")["state"]
    distances = sorted(own["horizon"].unique().tolist())
    begin = int(own["cutoff"].min())
    looks = sorted(set(own.loc[own["horizon"] == distances[0], "cutoff"].tolist()))
    for strategy, every in product(known.strategies, (*distances, None)):
        if strategy == IN_ORDER and every is not None:
            continue
        plan, planned_at = known.planning.in_order(known.load.experts), None
        for cutoff in looks:
            due = cutoff == begin if every is None else (cutoff - begin) % every == 0
            horizon = every or distances[-1]
            before, made = plan, due and known.shares(strategy, cutoff, horizon) is not None
            if made:
                plan, planned_at = known.replanned(plan, strategy, cutoff, horizon), cutoff
            after = known.load.after(cutoff, distances[0]).counts
            yield {
                "strategy": strategy,
                "replan_every": every,
                "cutoff": cutoff,
                "state": states[cutoff if planned_at is None else planned_at],
                **known.planning.evenness(plan, after)._asdict(),
                **known.planning.by_node(plan, after, top_k)._asdict(),
                "moved": plan.moved(before) if made and cutoff > begin else None,
            }


def replanning_summary(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over layers and stretches, one row per trace, strategy, state (and ``all``) and distance of the plans.

    *difference* is how much higher the peak is than with plans made at the shortest distance, in parts
    of the mean GPU's load, with a 95 % interval from a paired bootstrap over layers and stretches.
    *moved* is the part of the slots that one plan changes, *moved_per_1000* what 1,000 steps change.
    """
    keys, cell = ["trace", "strategy", "state", "replan_every"], ["trace", "strategy", "layer", "cutoff"]
    shortest = frame["replan_every"].min()
    often = frame[frame["replan_every"] == shortest].set_index(cell)["peak_over_mean"].rename("often")
    known = frame.join(often, on=cell)
    known = known.assign(apart=known["peak_over_mean"] - known["often"])

    def more(_group: pd.DataFrame, scored: pd.DataFrame) -> dict[str, Any]:
        return {"moved_per_1000": scored["moved"].sum() / len(scored) * 1000 / shortest}

    measures = ("peak_over_mean", "balance", *ByNode._fields, "moved")
    found = summarise(known, keys, measures, more, seed)
    columns = [*keys, "peak_over_mean", *DIFFERENCE, *measures[1:], "moved_per_1000", "cutoffs", "scored"]
    return found.reindex(columns=columns).astype({"replan_every": "Int64"})


def plan_holds(summary: pd.DataFrame, strategy: str, state: str) -> int | None:
    """For how many steps a plan that *strategy* made in *state* holds: it is not worse by `ENOUGH` than later ones.

    That is the longest distance up to which none is worse than the shortest; None where a plan kept to the
    end is not worse either. *summary* is that of one trace.
    """
    own = summary[(summary["strategy"] == strategy) & (summary["state"] == state)]
    worse = (own["difference"] > ENOUGH).tolist()
    holds = own["replan_every"].iloc[: worse.index(True) if True in worse else None]
    return None if holds.isna().any() else int(holds.max())
