"""Tidy frames of what was computed: what is printed, written, and drawn from.

One row is one observation; columns carry the words of the project and full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moetrace.backtest import Backtest
from moetrace.metrics import IMBALANCE
from moetrace.noise import BLOCK, block_means, step_noise
from moetrace.states import STABLE, TRANSIENT, LayerStates, classify, fluctuation
from moetrace.trace import Finding, LayerLoad, LoadTrace

if TYPE_CHECKING:
    import pandas as pd

# Points of a curve beyond which a figure shows no more and a file only grows.
CURVE_POINTS = 600
# The window of the layers table: the paper's middle one.
LAYER_WINDOW = 100
BOOTSTRAP_ROUNDS = 2000
# Fewer cutoffs than this say nothing about the scatter over cutoffs.
LEAST_CUTOFFS = 3


def traces_frame(traces: Iterable[LoadTrace]) -> pd.DataFrame:
    """One row per trace: its size, source and what was noticed."""
    import pandas as pd

    rows = [
        {
            "trace": trace.name,
            "steps": len(trace.steps),
            "first_step": int(trace.steps[0]),
            "last_step": int(trace.steps[-1]),
            "stride": trace.stride,
            "layers": len(trace.layers),
            "experts": trace.experts,
            "tokens_per_step": trace.info.tokens_per_step,
            "format": trace.info.format,
            "source": trace.info.source,
            "fingerprint": trace.info.fingerprint,
            "findings": ", ".join(finding.name for finding in trace.info.findings),
        }
        for trace in traces
    ]
    return pd.DataFrame(rows).astype({"tokens_per_step": "Int64"} if rows else {})


def findings_frame(trace: str, findings: Iterable[Finding]) -> pd.DataFrame:
    """One row per finding of the doctor."""
    import pandas as pd

    rows = [{"trace": trace, **vars(finding)} for finding in findings]
    return pd.DataFrame(rows, columns=["trace", *Finding.__dataclass_fields__])


def layers_frame(load: LayerLoad, states: LayerStates) -> pd.DataFrame:
    """One row: when the layer settled, its state now, its fluctuation before and after.

    *movement* is the relative change of the load from one window of 200 steps to the next, noise
    taken off; *variance_100* and *range_100* are the paper's, for windows of 100 steps, mean over
    experts; *step_noise* is what one step scatters. NaN where there is no before or after.
    """
    import pandas as pd

    first, last = int(load.steps[0]), int(load.steps[-1])
    border = last + 1 if states.settle_step is None else states.settle_step
    row = {
        "trace": load.trace,
        "layer": load.layer,
        "settle_step": states.settle_step,
        "state": states.state,
        "movement_before": states.movement_in(first, border - 1),
        "movement_after": states.movement_in(border, last),
        **_before_and_after(load, border),
        "step_noise": step_noise(load),
    }
    return pd.DataFrame([row]).astype({"settle_step": "Int64"})


def _before_and_after(load: LayerLoad, border: int) -> dict[str, float]:
    """Mean sliding variance and range on either side of the step *border*."""
    sides = {"before": load.between(int(load.steps[0]), border - 1), "after": load.between(border, int(load.steps[-1]))}
    found = {side: fluctuation(part, [LAYER_WINDOW]) for side, part in sides.items()}
    return {
        f"{measure}_{LAYER_WINDOW}_{side}": float(getattr(windows[0], measure).mean()) if windows else float("nan")
        for measure in ("variance", "range")
        for side, windows in found.items()
    }


def state_frames(
    trace: LoadTrace, *, experts: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, pd.DataFrame]:
    """The frames ``layers`` and ``windows`` of a trace, and ``experts`` when asked for; one layer at a time."""
    parts: dict[str, list[pd.DataFrame]] = {"layers": [], "windows": []}
    if experts:
        parts["experts"] = []
    for done, load in enumerate(trace.by_layer(), 1):
        found = classify(load)
        parts["layers"].append(layers_frame(load, found))
        parts["windows"].append(windows_frame([found]))
        if experts:
            parts["experts"].append(experts_frame(load))
        if progress is not None:
            progress(done, len(trace.layers))
    return {name: stacked(frames) for name, frames in parts.items()}


def course_frames(trace: LoadTrace) -> dict[str, pd.DataFrame]:
    """The frames ``load``, ``fluctuation`` and ``imbalance`` of a trace; one layer at a time."""
    made = {"load": load_frame, "fluctuation": fluctuation_frame, "imbalance": imbalance_frame}
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in made}
    for load in trace.by_layer():
        for name, make in made.items():
            parts[name].append(make(load))
    return {name: stacked(frames) for name, frames in parts.items()}


def score_frames(test: Backtest, seed: int = 0) -> dict[str, pd.DataFrame]:
    """The frames ``scores``, ``summary``, ``course`` of the error, ``shares`` and ``last_shares``."""
    return {
        "summary": summary_frame(test.scores, seed),
        "scores": test.scores,
        "course": course_frame(test.scores),
        "shares": test.shares,
        "last_shares": at_last_cutoff(test.shares),
    }


def windows_frame(states: Iterable[LayerStates]) -> pd.DataFrame:
    """One row per run of one state."""
    import pandas as pd

    rows = [{"trace": found.trace, "layer": found.layer, **run._asdict()} for found in states for run in found.runs]
    return pd.DataFrame(rows, columns=["trace", "layer", "from_step", "to_step", "state"])


def experts_frame(load: LayerLoad) -> pd.DataFrame:
    """One row per expert and window: mean sliding variance and range of its share, and its share."""
    import pandas as pd

    rows = [
        {
            "trace": load.trace,
            "layer": load.layer,
            "expert": expert,
            "window": found.window,
            "share": float(load.mean_shares[expert]),
            "variance": float(found.variance[:, expert].mean()),
            "range": float(found.range[:, expert].mean()),
        }
        for found in fluctuation(load)
        for expert in range(load.experts)
    ]
    return pd.DataFrame(rows)


def load_frame(load: LayerLoad) -> pd.DataFrame:
    """The course of the load: one row per expert and moment, shares averaged over blocks of steps."""
    import pandas as pd

    rows = max(load.rows(BLOCK), -(-len(load.steps) // CURVE_POINTS))
    rows = min(rows, max(1, len(load.steps) // 2))
    means = block_means(load, rows)
    ends = load.steps[len(load.steps) - len(means) * rows :].reshape(-1, rows)[:, -1]
    moments, experts = np.indices(means.shape)
    return pd.DataFrame(
        {
            "trace": load.trace,
            "layer": load.layer,
            "expert": experts.ravel(),
            "step": ends[moments.ravel()],
            "share": means.ravel(),
        }
    )


def fluctuation_frame(load: LayerLoad) -> pd.DataFrame:
    """The course of the sliding variance and range, mean over experts: one row per window and moment."""
    import pandas as pd

    parts = []
    for found in fluctuation(load):
        every = -(-len(found.steps) // CURVE_POINTS)
        parts.append(
            pd.DataFrame(
                {
                    "trace": load.trace,
                    "layer": load.layer,
                    "window": found.window,
                    "step": found.steps[::every],
                    "variance": found.variance[::every].mean(axis=1),
                    "range": found.range[::every].mean(axis=1),
                }
            )
        )
    columns = ["trace", "layer", "window", "step", "variance", "range"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def imbalance_frame(load: LayerLoad, last: int = 1000) -> pd.DataFrame:
    """Every definition of imbalance for the load of the *last* steps: one row per definition."""
    import pandas as pd

    share = load.last(last).mean_shares
    rows = [
        {"trace": load.trace, "layer": load.layer, "definition": name, "of": whose, "value": measure(share)}
        for name, (measure, whose) in IMBALANCE.items()
    ]
    return pd.DataFrame(rows)


# --- summaries of scores -----------------------------------------------------------------------

MEASURES = ("error_rate", "error_noise", "step_error_rate", "step_noise", "mape", "abs_points")


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
        low, middle, high = _difference(scored, seed)
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


def _difference(scored: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """2.5 %, mean and 97.5 % of the difference from `window_mean`, resampling cutoffs and layers.

    Both are resampled, not single scores: layers share a cutoff's batches, and cutoffs a layer's moods.
    """
    nothing = float("nan")
    if scored.empty:
        return nothing, nothing, nothing
    apart = scored.assign(apart=scored["error_rate"] - scored["window_mean_error_rate"])
    table = apart.pivot_table(index="cutoff", columns="layer", values="apart", aggfunc="mean").to_numpy()
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


def at_last_cutoff(shares: pd.DataFrame) -> pd.DataFrame:
    """Predicted and actual shares at the last cutoff that was scored, for the longest horizon."""
    longest = shares[shares["horizon"] == shares["horizon"].max()]
    last: pd.DataFrame = longest[longest["cutoff"] == longest["cutoff"].max()]
    return last


def stacked(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of frames with the same columns, one after the other; empty for none."""
    import pandas as pd

    filled = [part for part in parts if len(part)]
    return pd.concat(filled or list(parts)[:1], ignore_index=True) if parts else pd.DataFrame()
