"""What resident sets and caches cover on the real traces; prints Markdown tables.

python benchmarks/residency.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from accuracy import HELD_OUT, SAMPLES, TRACES

import moetrace as mt
from moetrace.reporting.tables import markdown

# Of servers, the tokens of decode alone: with one or few tokens a pass, active experts are what counts.
DECODE = ("large/gpt-moe-128e-serving-decode", "large/qwen3-moe-64e-vllm-decode")
PREDICTORS = ("level", "window_mean", "ema", "auto")
METHODS = ("refreshed", "lru", "lfu", "oracle_static", "oracle")
RATES = {"hit_rate": "Token choices whose expert was resident", "active_hit_rate": "Active experts that were resident"}
ANSWER = ["trace", "slots", "above_mean", "hit_rate", "hindsight", "by_load_adds", "active_hit_rate", "oracle", "ends", "holds", "reach", "worth"]  # fmt: skip


def main() -> None:
    """Score a quarter of the experts and the other parts, and print."""
    summaries, answers = [], []
    for name in (*TRACES, *DECODE, *HELD_OUT):
        # A pass of prefill alone has no tokens of decode.
        trace = mt.read_trace(SAMPLES / f"{name}.parquet", options=mt.ReadOptions(accept=("empty",)))
        found = mt.hot(trace, predictor=PREDICTORS, slots=trace.experts // 4)
        summary = found.frames["summary"].assign(trace=Path(name).name)
        summaries.append(summary.assign(part=summary["slots"].astype(int).astype(str) + f" of {trace.experts}"))
        answers.append(found.answer.as_row() | {"trace": Path(name).name})
    frame = pd.concat(summaries)
    frame = frame[(frame["state"] == "all") & (frame["allocation"] == "equal")].sort_values(["trace", "slots"])
    for rate, title in RATES.items():
        table = frame.assign(percent=(100 * frame[rate]).round(1))
        table = table.pivot_table(index=["trace", "slots", "part"], columns="method", values="percent", observed=True)
        table = table[[*PREDICTORS, *METHODS]].rename(columns=str).reset_index().drop(columns="slots")
        print(f"\n{title}:\n\n{markdown(table)}")
    print("\nA quarter of the experts of every layer, in fractions, and for how many steps a set holds:\n")
    print(markdown(pd.DataFrame(answers)[ANSWER]))


if __name__ == "__main__":
    main()
