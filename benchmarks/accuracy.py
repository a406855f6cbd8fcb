"""How wrong each predictor is on the real traces, how that was chosen, and what others do on the same cutoffs.

Prints Markdown tables. `error_rate` in percent; choices were made on gpt-moe-8e-a, the other
traces are only reported on. Rivals run in the environment whose Python is in MOETRACE_RIVALS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import moetrace as mt
from moetrace.forecasting.backtest import evaluate
from moetrace.forecasting.summary import summary_frame
from moetrace.forecasting.windows import default_cutoffs

SAMPLES = Path(__file__).parent.parent / "sample_traces"
SMALL = ("gpt-moe-8e-a", "gpt-moe-8e-b", "large/gpt-moe-32e-d")
TRACES = (*SMALL, "large/gpt-moe-128e-f", "large/gpt-moe-128e-serving", "large/qwen3-moe-64e-vllm")
# Recorded when everything was chosen, and never looked at before.
HELD_OUT = ("held_out/gpt-moe-16e-h", "held_out/gpt-moe-32e-i")
HORIZONS = (1000, 2000)
OURS = ("auto", "level", "sw_avg", "arima", "lstm", "window_mean", "ema")
# What a single fixed setting could have been, for the comparison with the best of them in hindsight.
FIXED = (
    "window_mean:window=300",
    "window_mean:window=500",
    "window_mean:window=700",
    "window_mean",
    "window_mean:trend=0.3",
    "sw_avg:window=300",
    "sw_avg",
    "sw_avg:window=700",
    "ema:decay=0.99",
    "ema:decay=0.995",
    "ema:decay=0.998",
    "level",
    "level:trend=0.1",
    "level:trend=0.2",
    "arima",
)
ARIMAS = (
    "arima",
    "arima:block=25",
    "arima:block=100",
    "arima:history=1500",
    "arima:history=4000",
    "arima:order=0,1,2",
    "arima:order=1,1,1",
    "arima:order=1,1,2",
)
RIVAL_CUTOFFS = (3000, 5000, 7000)
RIVAL_HISTORY = 2000


def trace_of(name: str) -> mt.LoadTrace:
    return mt.read_trace(SAMPLES / f"{name}.parquet")


def scores_of(name: str, specs: Sequence[str], cutoffs: Sequence[int] | None = None) -> pd.DataFrame:
    trace = trace_of(name)
    return evaluate(trace, [mt.predictor(spec) for spec in specs], HORIZONS, cutoffs).scores


def by_predictor() -> str:
    """Every predictor on every trace, stable cutoffs, with the difference from window_mean and the coverage."""
    lines = [
        "| trace | state | predictor | horizon | error_rate % | noise % | difference from window_mean | inside, 80 % / 95 % | scored |",
        "|---|---|---|---:|---:|---:|---|---|---:|",
    ]
    for name in (*TRACES, *HELD_OUT):
        summary = summary_frame(scores_of(name, OURS))
        for row in summary[summary["state"].isin(["stable", "transient"])].itertuples():
            difference = f"{100 * row.difference:+.2f}"
            if row.difference_low == row.difference_low:
                difference += f" [{100 * row.difference_low:+.2f}, {100 * row.difference_high:+.2f}]"
            held = f"{100 * row.coverage_80:.0f} % / {100 * row.coverage_95:.0f} %"
            lines.append(
                f"| {Path(name).name} | {row.state} | {row.predictor} | {row.horizon:,} | {100 * row.error_rate:.2f} | {100 * row.error_noise:.2f} | {difference} | {held} | {row.scored} |"
            )
    return "\n".join(lines) + "\n"


def mean_errors(specs: Sequence[str], cutoffs_from: int, traces: Sequence[str] = (*TRACES, *HELD_OUT)) -> pd.DataFrame:
    """Mean error_rate in percent, one row per predictor, one column per trace, both horizons averaged."""
    columns = {}
    for name in traces:
        trace = trace_of(name)
        at = [cutoff for cutoff in default_cutoffs(trace) if cutoff >= cutoffs_from]
        scores = scores_of(name, specs, at).dropna(subset="error_rate")
        columns[Path(name).name] = 100 * scores.groupby("predictor", sort=False)["error_rate"].mean()
    table = pd.DataFrame(columns)
    return table.assign(mean=table.mean(axis=1))


def markdown(table: pd.DataFrame, rows: str = "predictor") -> str:
    lines = [f"| {rows} | " + " | ".join(table.columns) + " |", "|---|" + "---:|" * len(table.columns)]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |"
        for name, row in zip(table.index, table.to_numpy())
    ]
    return "\n".join(lines)


def against_hindsight() -> str:
    """`auto` against the best single fixed setting, over all default cutoffs and over those from step 3,000."""
    parts = []
    for first in (0, 3000):
        table = mean_errors(["auto", *FIXED], first)
        fixed = table.drop(index="auto")
        best = fixed["mean"].idxmin()
        apart = 100 * (table.loc["auto"] / table.loc[best] - 1)
        text = ", ".join(f"{name} {value:+.1f} %" for name, value in apart.items())
        title = "All default cutoffs" if not first else f"Cutoffs from step {first:,}"
        parts += [
            f"{title}, mean of both horizons:",
            "",
            markdown(table),
            "",
            f"Best fixed setting in hindsight: `{best}`; `auto` beside it: {text}.",
            "",
        ]
    return "\n".join(parts)


def arima_choices() -> str:
    """Orders, blocks and histories of arima, over the cutoffs from step 3,000."""
    return markdown(mean_errors([*ARIMAS, "window_mean"], 3000, SMALL))


def across_runs() -> str:
    """lstm trained on the history, on the other run of the same shape, and on a run of another shape."""
    rows = {}
    for name, others in {
        "gpt-moe-8e-b": ("gpt-moe-8e-a", "large/gpt-moe-32e-d"),
        "gpt-moe-8e-a": ("gpt-moe-8e-b",),
    }.items():
        trace = trace_of(name)
        at = [cutoff for cutoff in default_cutoffs(trace) if cutoff >= 3000]
        for trained in ("", *others):
            train_on = [trace_of(trained)] if trained else []
            scores = evaluate(
                trace, [mt.predictor("lstm"), mt.predictor("window_mean")], HORIZONS, at, train_on=train_on
            ).scores
            means = 100 * scores.groupby(["predictor", "horizon"])["error_rate"].mean()
            label = f"{name}, trained on {Path(trained).name if trained else 'its own history'}"
            rows[label] = [
                means["lstm", 1000],
                means["lstm", 2000],
                means["window_mean", 1000],
                means["window_mean", 2000],
            ]
    return markdown(
        pd.DataFrame(rows, index=["lstm 1,000", "lstm 2,000", "window_mean 1,000", "window_mean 2,000"]).T, "trace"
    )


# --- rivals ------------------------------------------------------------------------------------

RIVALS = """
import json, sys, time, warnings
import numpy as np, pandas as pd
from statsforecast import StatsForecast
from statsforecast.models import ARIMA, AutoARIMA, AutoETS, Theta
warnings.simplefilter("ignore")
models = {"AutoARIMA": AutoARIMA(), "AutoETS": AutoETS(), "Theta": Theta(), "ARIMA(5,1,5)": ARIMA(order=(5, 1, 5))}
for path in sys.argv[1:]:
    series = np.load(path)
    frame = pd.DataFrame({
        "unique_id": np.repeat(np.arange(series.shape[1]), len(series)),
        "ds": np.tile(np.arange(len(series)), series.shape[1]), "y": series.T.ravel(),
    })
    for name, model in models.items():
        forecast = StatsForecast(models=[model], freq=1).forecast(df=frame, h=2000)
        column = [c for c in forecast.columns if c not in ("unique_id", "ds")][0]
        shares = forecast.pivot(index="ds", columns="unique_id", values=column).to_numpy()
        print(json.dumps({"path": path, "model": name, "means": {h: shares[:h].mean(axis=0).tolist() for h in (1000, 2000)}}))
"""


def beside_rivals(rivals: str) -> str:
    """statsforecast on the same cutoffs and layers, history of 2,000 single steps as it would be used."""
    errors: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SMALL[:2]:
            cases = {}
            for load in trace_of(name).by_layer():
                for cutoff in RIVAL_CUTOFFS:
                    path = Path(folder) / f"{name}-{load.layer}-{cutoff}.npy"
                    np.save(path, load.until(cutoff).last(RIVAL_HISTORY).shares)
                    cases[str(path)] = (load, cutoff)
            done = subprocess.run([rivals, "-c", RIVALS, *cases], capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                said = json.loads(line)
                load, cutoff = cases[said["path"]]
                for horizon, mean in said["means"].items():
                    share = np.clip(mean, 0, None) / np.clip(mean, 0, None).sum()
                    wrong = float(np.abs(share - load.after(cutoff, int(horizon)).mean_shares).sum())
                    errors.setdefault(said["model"], {}).setdefault(f"{name}, {int(horizon):,}", []).append(wrong)
    table = pd.DataFrame(
        {model: {key: 100 * np.mean(value) for key, value in by.items()} for model, by in errors.items()}
    ).T
    ours = {}
    for name in SMALL[:2]:
        scores = scores_of(name, OURS, RIVAL_CUTOFFS)
        for (made, horizon), value in (100 * scores.groupby(["predictor", "horizon"])["error_rate"].mean()).items():
            ours.setdefault(made, {})[f"{name}, {horizon:,}"] = value
    together = pd.concat([pd.DataFrame(ours).T.loc[list(OURS)], table.rename(index=lambda n: f"statsforecast {n}")])
    return markdown(together[table.columns])


def main() -> None:
    print("### Every predictor on every real trace\n")
    print(by_predictor())
    print("### auto against the best fixed setting in hindsight\n")
    print(against_hindsight())
    print("### ARIMA: order, block and history\n\nCutoffs from step 3,000, mean of both horizons.\n")
    print(arima_choices())
    print("\n### Trained on one run, used on another\n\nCutoffs from step 3,000.\n")
    print(across_runs())
    rivals = os.environ.get("MOETRACE_RIVALS")
    if rivals:
        cutoffs = ", ".join(f"{cutoff:,}" for cutoff in RIVAL_CUTOFFS)
        print(f"\n### Beside others\n\nCutoffs {cutoffs}, all layers.\n")
        print(beside_rivals(rivals))
    else:
        print("MOETRACE_RIVALS is not set: no rivals", file=sys.stderr)


if __name__ == "__main__":
    main()
