"""Frames about forecasts: scores, their summaries, and what figures of them are drawn from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from moetrace.analysis.states import STABLE, TRANSIENT
from moetrace.analysis.tables import stacked
from moetrace.forecasting.backtest import Backtest
from moetrace.forecasting.forecasts import Coming
from moetrace.forecasting.intervals import bounds

if TYPE_CHECKING:
    import pandas as pd

BOOTSTRAP_ROUNDS = 2000
# Fewer cutoffs than this say nothing about the scatter over cutoffs.
LEAST_CUTOFFS = 3
MEASURES = (
    "error_rate", "error_noise", "step_error_rate", "step_noise", "mape", "abs_points", "coverage_80", "coverage_95",
)  # fmt: skip


def score_frames(test: Backtest, seed: int = 0) -> dict[str, pd.DataFrame]:
    """The frames ``scores``, ``summary``, ``course`` of the error, ``shares`` and ``last_shares``."""
    return {
        "summary": summary_frame(test.scores, seed),
        "scores": test.scores,
        "course": course_frame(test.scores),
        "shares": test.shares,
        "last_shares": at_last_cutoff(test.shares),
    }


def summary_frame(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean errors over layers and cutoffs, one row per trace, predictor, horizon and state, and for all.

    *cutoffs* and *scored* count what was averaged, *too_short* and *fallbacks* what was not scored
    or was forecast by a stand-in. *difference* is the mean of ``error_rate - error_rate of
    window_mean`` over the same layers and cutoffs, with a 95 % interval from a paired bootstrap.
    """
    import pandas as pd

    keys = ["trace", "horizon", "predictor", "state"]
    both = pd.concat([scores, scores.assign(state="all")], ignore_index=True)
    # Predictors in the order they were asked for, states in that of a run.
    both["predictor"] = pd.Categorical(both["predictor"], scores["predictor"].unique())
    both["state"] = pd.Categorical(both["state"], (TRANSIENT, STABLE, "all"))
    rows = []
    for key, group in both.groupby(keys, observed=True):
        scored = group.dropna(subset="error_rate")
        row = dict(zip(keys, key)) | {name: scored[name].mean() for name in MEASURES}
        apart = scored.assign(apart=scored["error_rate"] - scored["window_mean_error_rate"])
        low, middle, high = paired_interval(apart, seed)
        reference = scored["window_mean_error_rate"].sum()
        rows.append(
            row
            | {
                "skill": 1 - scored["error_rate"].sum() / reference if reference > 0 else float("nan"),
                "difference": middle,
                "difference_low": low,
                "difference_high": high,
                "cutoffs": scored["cutoff"].nunique(),
                "scored": len(scored),
                "too_short": int((group["status"] == "too_short").sum()),
                "fallbacks": int(group["status"].str.startswith("fallback").sum()),
                "seconds": scored[["fit_seconds", "forecast_seconds"]].sum(axis=1).mean(),
            }
        )
    columns = [*keys, *MEASURES, "skill", "difference", "difference_low", "difference_high"]
    columns += ["cutoffs", "scored", "too_short", "fallbacks", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def paired_interval(scored: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """2.5 %, mean and 97.5 % of the column *apart*, resampling the cutoffs and the layers of the rows.

    Both are resampled, not single scores: layers share a cutoff's batches, and cutoffs a layer's moods.
    """
    nothing = float("nan")
    if scored.empty:
        return nothing, nothing, nothing
    table = scored.pivot_table(index="cutoff", columns="layer", values="apart", aggfunc="mean").to_numpy()
    if len(table) < LEAST_CUTOFFS:
        return nothing, float(np.nanmean(table)), nothing
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, table.shape[0], (BOOTSTRAP_ROUNDS, table.shape[0]))
    columns = rng.integers(0, table.shape[1], (BOOTSTRAP_ROUNDS, table.shape[1]))
    known = ~np.isnan(table)
    filled = np.where(known, table, 0.0)
    drawn = [(filled[np.ix_(r, c)].sum(), known[np.ix_(r, c)].sum()) for r, c in zip(rows, columns)]
    means = [total / n for total, n in drawn if n]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(np.nanmean(table)), float(high)


def course_frame(scores: pd.DataFrame) -> pd.DataFrame:
    """Error and noise over the run: the mean over layers at each cutoff, per predictor and horizon."""
    keys = ["trace", "predictor", "horizon", "cutoff"]
    means: pd.DataFrame = scores.groupby(keys, sort=False)[["error_rate", "error_noise"]].mean().reset_index()
    return means


def means_frame(forecasts: Iterable[tuple[str, Coming]], horizon: int) -> pd.DataFrame:
    """The mean share of each expert over the *horizon* steps after the end, with its 80 % and 95 % intervals.

    *forecasts* are pairs of trace and `Coming`; one row per expert.
    """
    import pandas as pd

    parts = []
    for trace, coming in forecasts:
        share = coming.shares.mean(axis=0)
        key = {"trace": trace, "predictor": coming.predictor, "layer": coming.layer, "horizon": horizon}
        ends = bounds(share, coming.deviation)
        parts.append(pd.DataFrame({**key, "expert": np.arange(len(share)), "share": share, **ends}))
    return stacked(parts)


def at_last_cutoff(shares: pd.DataFrame) -> pd.DataFrame:
    """Predicted and actual shares at the last cutoff that was scored, for the longest horizon."""
    longest = shares[shares["horizon"] == shares["horizon"].max()]
    last: pd.DataFrame = longest[longest["cutoff"] == longest["cutoff"].max()]
    return last
