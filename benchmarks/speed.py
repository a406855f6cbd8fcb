"""How long a fit and a forecast take, and how far off they are, beside other libraries.

    python benchmarks/speed.py --rivals PYTHON

Prints a Markdown table of ratios with the errors beside them. One series is the share of one expert;
every method sees the 2,000 steps before a cutoff and forecasts the 2,000 after it, over several cutoffs
and all layers of a sample trace. statsforecast pins an older pandas, so the rivals run in an
environment of their own (statsforecast, neuralforecast and a torch), in a child of the Python given.
statsmodels takes seconds for a series and is asked at the last cutoff only; its error stands beside
the errors of the others at that same cutoff.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HISTORY = 2000
HORIZONS = (1000, 2000)
CUTOFFS = (3000, 5000, 7000, 4000)
SAMPLE = Path(__file__).parent.parent / "sample_traces" / "gpt-moe-8e-a.parquet"
OURS, STATSFORECAST, STATSMODELS = "moetrace `arima`", "statsforecast ARIMA(5,1,5)", "statsmodels ARIMA(5,1,5).fit()"


def problems(path: Path) -> list[tuple[int, int]]:
    """Writes histories and what then happened, (layers, steps, experts), for each cutoff; the cutoffs and layers."""
    from moetrace import read_trace

    trace = read_trace(SAMPLE)
    arrays = {}
    for cutoff in CUTOFFS:
        loads = list(trace.by_layer())
        arrays[f"history-{cutoff}"] = np.stack([load.until(cutoff).last(HISTORY).counts for load in loads])
        arrays[f"whole-{cutoff}"] = np.stack([load.until(cutoff).last(cutoff).counts for load in loads])
        arrays[f"after-{cutoff}"] = np.stack([load.after(cutoff, max(HORIZONS)).counts for load in loads])
    np.savez(path, **arrays)
    return [(cutoff, layer) for cutoff in CUTOFFS for layer in range(len(trace.layers))]


def errors(shares: np.ndarray, counts: np.ndarray) -> dict[int, float]:
    """`error_rate` at each horizon of a forecast (steps, experts), clipped and normalised as moetrace does for all."""
    shares = np.clip(np.nan_to_num(shares), 0, None)
    shares = shares / shares.sum(axis=1, keepdims=True)
    found = {}
    for horizon in HORIZONS:
        totals, actual = counts[:horizon].sum(axis=1), counts[:horizon].sum(axis=0) / counts[:horizon].sum()
        found[horizon] = float(np.abs(totals @ shares[:horizon] / totals.sum() - actual).sum())
    return found


def measured(method: Callable[[np.ndarray], np.ndarray], path: Path, which: list[tuple[int, int]]) -> list[dict]:
    """Seconds for a series and errors of *method*, counts (steps, experts) in and shares (steps, experts) out."""
    rows = []
    with np.load(path) as arrays:
        method(arrays[f"history-{which[0][0]}"][which[0][1], -300:])  # imports and compiles
        for cutoff, layer in which:
            history, after = arrays[f"history-{cutoff}"][layer], arrays[f"after-{cutoff}"][layer]
            began = time.perf_counter()
            shares = method(history)
            seconds = (time.perf_counter() - began) / history.shape[1]
            rows.append({"cutoff": cutoff, "layer": layer, "seconds": seconds, "errors": errors(shares, after)})
    return rows


# --- the methods ------------------------------------------------------------------------------


def with_moetrace(counts: np.ndarray) -> np.ndarray:
    from moetrace import LoadTrace, predictor

    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    made = predictor("arima")
    return made.fit([load]).forecast(load, max(HORIZONS)).shares


def with_statsforecast(counts: np.ndarray) -> np.ndarray:
    from statsforecast.models import ARIMA

    model = ARIMA(order=(5, 1, 5))
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.stack([model.forecast(y=np.ascontiguousarray(s), h=max(HORIZONS))["mean"] for s in shares.T], axis=1)


def with_statsmodels(counts: np.ndarray) -> np.ndarray:
    import warnings

    from statsmodels.tsa.arima.model import ARIMA

    warnings.simplefilter("ignore")
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.stack([ARIMA(s, order=(5, 1, 5)).fit().forecast(max(HORIZONS)) for s in shares.T], axis=1)


# --- the networks -----------------------------------------------------------------------------

# A network sees all series together, as means of 50 steps: single steps of 2,000 ahead are too many for either.
BLOCK = 50


def networks_moetrace(layers: np.ndarray) -> np.ndarray:
    from moetrace import LoadTrace, predictor

    loads = list(LoadTrace.from_counts(np.moveaxis(layers, 0, 1)).by_layer())
    fitted = predictor("lstm").fit(loads)
    return np.stack([fitted.forecast(load, max(HORIZONS)).shares for load in loads])


def networks_neuralforecast(layers: np.ndarray) -> np.ndarray:
    import logging
    import warnings

    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import LSTM

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    shares = layers / layers.sum(axis=2, keepdims=True)
    n, steps, experts = shares.shape
    means = shares.reshape(n, steps // BLOCK, BLOCK, experts).mean(axis=2)
    long = pd.DataFrame(means.transpose(0, 2, 1).reshape(n * experts, -1)).stack().rename_axis(["unique_id", "ds"])
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    model = LSTM(h=max(HORIZONS) // BLOCK, input_size=20, scaler_type="robust", **quiet)
    forecaster = NeuralForecast([model], freq=1)
    forecaster.fit(long.rename("y").reset_index())
    said = forecaster.predict().sort_values(["unique_id", "ds"])["LSTM"].to_numpy()
    return np.repeat(said.reshape(n, experts, -1).transpose(0, 2, 1), BLOCK, axis=1)


NETWORKS = {"moetrace `lstm`": networks_moetrace, "neuralforecast LSTM": networks_neuralforecast}


def measured_network(method: Callable[[np.ndarray], np.ndarray], path: Path, cutoffs: list[int]) -> list[dict]:
    """As `measured`, all layers together: counts (layers, steps, experts) in, shares of the same shape out."""
    rows = []
    with np.load(path) as arrays:
        for cutoff in cutoffs:
            whole, after = arrays[f"whole-{cutoff}"], arrays[f"after-{cutoff}"]
            began = time.perf_counter()
            shares = method(whole)
            seconds = (time.perf_counter() - began) / (len(whole) * whole.shape[2])
            rows += [
                {"cutoff": cutoff, "layer": i, "seconds": seconds, "errors": errors(shares[i], after[i])}
                for i in range(len(whole))
            ]
    return rows


METHODS = {OURS: with_moetrace, STATSFORECAST: with_statsforecast, STATSMODELS: with_statsmodels}


# --- the table --------------------------------------------------------------------------------


def in_child(python: str, name: str, path: Path, which: list[tuple[int, int]]) -> list[dict]:
    """What `measured` says in a process of the interpreter *python*."""
    asked = json.dumps({"name": name, "path": str(path), "which": which})
    done = subprocess.run([python, __file__, "--child", asked], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def mean(rows: list[dict], horizon: int, cutoffs: tuple[int, ...]) -> str:
    chosen = [row["errors"][str(horizon)] for row in rows if row["cutoff"] in cutoffs]
    return f"{100 * np.mean(chosen):.2f} %" if chosen else ""


def table(rivals: str) -> str:
    """The table in Markdown; *rivals* is the interpreter of their environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.npz"
        every = problems(path)
        last = [(cutoff, layer) for cutoff, layer in every if cutoff == CUTOFFS[-1]]
        found = {
            OURS: in_child(sys.executable, OURS, path, every),
            STATSFORECAST: in_child(rivals, STATSFORECAST, path, every),
            STATSMODELS: in_child(sys.executable, STATSMODELS, path, last),
        }
        networks = {
            name: in_child(python, name, path, every) for name, python in zip(NETWORKS, (sys.executable, rivals))
        }
    return "\n\n".join([_table(found, OURS, len(every)), _table(networks, next(iter(NETWORKS)), len(every))])


def _table(found: dict[str, list[dict]], unit: str, every: int) -> str:
    """Times as ratios to those of *unit*; no mean over cutoffs for what was not asked at all of them."""
    seconds = {name: float(np.mean([row["seconds"] for row in rows])) for name, rows in found.items()}
    columns = [(h, c) for c in (CUTOFFS, CUTOFFS[-1:]) for h in HORIZONS]
    heads = [f"{h:,} steps, {f'cutoff {c[0]:,}' if len(c) == 1 else f'{len(c)} cutoffs'}" for h, c in columns]
    lines = [f"| fit and forecast | times as long | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    for name, rows in found.items():
        values = [mean(rows, h, c) if len(c) == 1 or len(rows) == every else "" for h, c in columns]
        lines.append(f"| {name} | {seconds[name] / seconds[unit]:.0f} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", default=sys.executable, help="Python of the environment that has statsforecast")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        asked = json.loads(given.child)
        path, which = Path(asked["path"]), [tuple(place) for place in asked["which"]]
        if asked["name"] in NETWORKS:
            rows = measured_network(NETWORKS[asked["name"]], path, list(dict.fromkeys(cutoff for cutoff, _ in which)))
        else:
            rows = measured(METHODS[asked["name"]], path, which)
        print(json.dumps(rows))
    else:
        print(table(given.rivals))


if __name__ == "__main__":
    main()
