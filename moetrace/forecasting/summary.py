"""Tables of a backtest: scores, their means by predictor and state, and what figures of them are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.forecasting.backtest import Backtest
from moetrace.forecasting.intervals import bounds
from moetrace.forecasting.layers import EndForecast
from moetrace.frames import stacked
from moetrace.words import STABLE, TRANSIENT, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

BOOTSTRAP_ROUNDS = 2000
# Fewer cutoffs than this say nothing about the scatter over cutoffs.
LEAST_CUTOFFS = 3
MEASURES = (
    "error_rate", "error_noise", "expected_error", "step_error_rate", "step_noise", "mape", "abs_points",
    "coverage_80", "coverage_95",
)  # fmt: skip
DIFFERENCE = ("difference", "difference_low", "difference_high")


def score_frames(test: Backtest, seed: int = 0) -> dict[str, pd.DataFrame]:
    """The tables ``summary``, ``scores``, ``course``, ``shares`` and ``last_shares``.

    ``course`` is error and noise over the run, the mean over layers at each cutoff; ``last_shares`` are those of the
    longest horizon at the last cutoff.
    """
    scores, shares = test.scores, test.shares
    courses = scores.groupby(["trace", "predictor", "horizon", "cutoff"], sort=False)
    course = courses[["error_rate", "error_noise"]].mean().reset_index()
    longest = shares[shares["horizon"] == shares["horizon"].max()]
    last = longest[longest["cutoff"] == longest["cutoff"].max()]
    summary = summary_frame(scores, seed)
    return {"summary": summary, "scores": scores, "course": course, "shares": shares, "last_shares": last}


def summary_frame(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean errors over layers and cutoffs, one row per trace, horizon, predictor and state, and for all states.

    *cutoffs* and *scored* count what was averaged, *too_short* and *fallbacks* what was not scored
    or was forecast by a stand-in. *difference* is the mean of ``error_rate - error_rate of
    window_mean`` over the same layers and cutoffs, with a 95 % interval from a paired bootstrap.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.WindowMean(), mt.Level()], horizons=[300], cutoffs=[500, 1000, 1500])
    >>> mt.summary_frame(test.scores)[["predictor", "state", "cutoffs"]].values.tolist()[-2:]
    [['level', 'stable', 1], ['level', 'all', 3]]
    """

    def more(group: pd.DataFrame, scored: pd.DataFrame) -> dict[str, Any]:
        baseline = scored["window_mean_error_rate"].sum()
        return {
            "skill": 1 - scored["error_rate"].sum() / baseline if baseline > 0 else float("nan"),
            "too_short": int((group["status"] == "too_short").sum()),
            "fallbacks": int(group["status"].str.startswith("fallback").sum()),
            "seconds": scored[["fit_seconds", "forecast_seconds"]].sum(axis=1).mean(),
        }

    known = scores.assign(apart=scores["error_rate"] - scores["window_mean_error_rate"])
    keys = ["trace", "horizon", "predictor", "state"]
    found = summarise(known, keys, MEASURES, more, seed, needs="error_rate")
    last = ["cutoffs", "scored", "too_short", "fallbacks", "seconds"]
    return found.reindex(columns=[*keys, *MEASURES, "skill", *DIFFERENCE, *last])


def summarise(
    frame: pd.DataFrame,
    keys: Sequence[str],
    measures: Sequence[str],
    more: Callable[[pd.DataFrame, pd.DataFrame], dict[str, Any]],
    seed: int,
    *,
    needs: str | None = None,
    order: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Means of *measures* and of ``apart`` by *keys*, in which ``state`` is each state and ``all`` of them together.

    ``difference`` is the mean of the column ``apart``, with a 95 % interval from `paired_interval`. *more* gives
    further columns from a group and from those rows of it that *needs*, a column, is known of; these are what
    is averaged. Predictors or strategies come in *order*, as they first appear unless given.
    """
    import pandas as pd

    both = pd.concat([frame, frame.assign(state="all")], ignore_index=True)
    by = next(key for key in keys if key in ("predictor", "strategy"))
    both[by] = pd.Categorical(both[by], list(order or frame[by].unique()))
    both["state"] = pd.Categorical(both["state"], (TRANSIENT, STABLE, UNKNOWN, "all"))
    rows = []
    for key, group in both.groupby(list(keys), observed=True, dropna=False):
        known = group.dropna(subset=needs) if needs else group
        low, middle, high = paired_interval(known.dropna(subset="apart"), seed)
        rows.append(
            dict(zip(keys, key))
            | {name: known[name].mean() for name in measures}
            | dict(zip(DIFFERENCE, (middle, low, high)))
            | {"cutoffs": known["cutoff"].nunique(), "scored": len(known)}
            | more(group, known)
        )
    return pd.DataFrame(rows)


def paired_interval(scored: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """2.5 %, mean and 97.5 % of the column *apart*, resampling the cutoffs and the layers of the rows.

    Both are resampled, not single scores: layers share the batches of a cutoff, and cutoffs share a layer's ways.
    """
    nothing = float("nan")
    if scored.empty:
        return nothing, nothing, nothing
    table = scored.pivot_table(index="cutoff", columns="layer", values="apart", aggfunc="mean").to_numpy()
    mean = float(np.nanmean(table))
    if len(table) < LEAST_CUTOFFS:
        return nothing, mean, nothing
    rng, rounds = np.random.default_rng(seed), np.arange(BOOTSTRAP_ROUNDS)[:, None]
    # How often each cutoff, and each layer, is drawn in each round: shape (rounds, n).
    drawn = (rng.integers(0, n, (BOOTSTRAP_ROUNDS, n)) + n * rounds for n in table.shape)
    cutoffs, layers = (np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape) for draws in drawn)
    known = ~np.isnan(table)
    total = ((cutoffs @ np.where(known, table, 0.0)) * layers).sum(axis=1)
    cells = ((cutoffs @ known) * layers).sum(axis=1)
    low, high = np.quantile(total[cells > 0] / cells[cells > 0], [0.025, 0.975])
    return float(low), mean, float(high)


def means_frame(forecasts: Iterable[EndForecast], horizon: int) -> pd.DataFrame:
    """The mean share of each expert over the *horizon* steps after the end, with its 80 % and 95 % intervals.

    One row per trace, predictor, layer and expert.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.WindowMean()], horizons=[300], ahead=True)
    >>> means = mt.means_frame(test.forecasts(), 300)
    >>> len(means), round(float(means["share"].sum()), 6)
    (8, 1.0)
    """
    import pandas as pd

    parts = []
    for ahead in forecasts:
        share = ahead.shares.mean(axis=0)
        rows = {"trace": ahead.trace, "predictor": ahead.predictor, "layer": ahead.layer, "horizon": horizon}
        rows |= {"expert": ahead.first_expert + np.arange(len(share)), "share": share}
        parts.append(pd.DataFrame(rows | bounds(share, ahead.half_widths)))
    return stacked(parts)
