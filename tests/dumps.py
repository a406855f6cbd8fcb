"""Dumps of a trace as their programs write them: one function per format, made with the real library."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from conftest import long_table

from moetrace import LoadTrace, ReadOptions


def parquet(trace: LoadTrace, folder: Path) -> Path:
    """One row per step, layer and expert, by pyarrow."""
    pq.write_table(long_table(trace), folder / "dump.parquet")
    return folder / "dump.parquet"


def csv(trace: LoadTrace, folder: Path) -> Path:
    """The same by pandas."""
    long_table(trace).to_pandas().to_csv(folder / "dump.csv", index=False)
    return folder / "dump.csv"


def jsonl(trace: LoadTrace, folder: Path) -> Path:
    """The counts of a layer in a list, by pandas."""
    rows = [
        {"step": int(step), "layer": layer, "counts": load.counts[i].tolist()}
        for i, step in enumerate(trace.steps)
        for layer, load in zip(trace.layers, trace.by_layer())
    ]
    pd.DataFrame(rows).to_json(folder / "dump.jsonl", orient="records", lines=True)
    return folder / "dump.jsonl"


def numpy(trace: LoadTrace, folder: Path) -> Path:
    """An .npz with counts, steps and layers."""
    np.savez(folder / "dump.npz", counts=trace.counts, steps=trace.steps, layers=trace.layers)
    return folder / "dump.npz"


DUMPS = {function.__name__: function for function in (parquet, csv, jsonl, numpy)}
# What a user has to say for a dump that does not tell.
OPTIONS: dict[str, ReadOptions] = {}
