"""Ingest beside pandas and beside the bare library: peak memory, and time as ratios.

Makes synthetic traces in the long layout, one row for each step, layer and expert in the order of the steps, and
prints Markdown tables. Each way runs in a process of its own, whose peak memory the system reports.

    python benchmarks/ingest.py                   60 layers x 256 experts x 20,000 steps: 307 million rows
    python benchmarks/ingest.py --steps 2000      the large trace no larger than the one for pandas
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import Run, run

from moetrace.synthetic import Course, settling, synthetic_blocks

LAYERS, EXPERTS = 60, 256
# Steps that pandas can hold on machines of 8 and of 24 GB: 31 and 92 million rows, 4.3 and 12.6 GiB.
PANDAS_STEPS = (2000, 6000)
# Each way is run so often, in turn, and the median counts: the first touch of memory is slow on some machines.
TIMES = 3
# Rows of a row group as pyarrow, pandas and Polars write them at most.
ROW_GROUP = 1 << 20

INGEST = """
import sys
from moetrace.cli import main
sys.exit(main(["ingest", sys.argv[1], "-w", sys.argv[2], "--force", "--quiet", "--json"]))
"""
PANDAS = """
import sys
import pandas as pd
frame = pd.read_parquet(sys.argv[1])
frame.pivot(index=["step", "layer"], columns="expert", values="tokens").to_numpy()
"""
POLARS = """
import sys
import polars as pl
frame = pl.read_parquet(sys.argv[1], columns=["step", "layer", "expert", "tokens"])
frame.pivot(on="expert", index=["step", "layer"], values="tokens").drop("step", "layer").to_numpy()
"""
# A row for each step and layer with a list of counts, as in the file that moetrace writes.
DUCKDB = """
import sys
import duckdb
rows = f"SELECT step, layer, list(tokens ORDER BY expert) AS counts FROM '{sys.argv[1]}' GROUP BY ALL ORDER BY ALL"
duckdb.sql(f"COPY ({rows}) TO '{sys.argv[2]}/duckdb.parquet' (COMPRESSION zstd)")
"""
FRAMES = {"pandas, read and pivot": PANDAS, "Polars, read and pivot": POLARS, "DuckDB, lists, written": DUCKDB}
# The same columns read and the same data written as plainly as the library allows.
BARE = """
import sys
import pyarrow.parquet as pq
with pq.ParquetFile(sys.argv[1]) as file, pq.ParquetWriter(sys.argv[2] + "/bare.parquet", file.schema_arrow) as writer:
    for batch in file.iter_batches(1 << 20, columns=["step", "layer", "expert", "tokens"]):
        writer.write_batch(batch)
"""


def write_long(path: Path, steps: int, layers: int = LAYERS, experts: int = EXPERTS) -> None:
    """A synthetic trace as a long Parquet file of any size, one block of steps in memory at a time."""
    courses = [settling(steps // 2, steps=steps, experts=experts, tokens=65_536) for _ in range(layers - 1)]
    courses.append(Course(steps=steps, experts=experts, tokens=65_536, changes=((1, 0.01),)))
    writer = None
    for at, counts in synthetic_blocks(courses, block=max(1, ROW_GROUP // (layers * experts))):
        cells = counts[0].size
        table = pa.table(
            {
                "step": np.repeat(at, cells),
                "layer": np.tile(np.repeat(np.arange(layers), experts), len(at)),
                "expert": np.tile(np.arange(experts), len(at) * layers),
                "tokens": counts.ravel(),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def timed(code: str, *arguments: object) -> Run:
    """Run Python *code* in a process of its own."""
    done = run([sys.executable, "-c", code, *arguments])
    if done.code:
        raise SystemExit(f"a way of the benchmark failed with {done.code}")
    return done


def size_of(steps: int) -> str:
    """What the rows of a table are headed with."""
    return f"{LAYERS} layers x {EXPERTS} experts x {steps:,} steps, {LAYERS * EXPERTS * steps / 1e6:,.0f} million rows"


def compared(steps: int, ways: dict[str, str], folder: Path) -> list[str]:
    """Lines of the table: each way beside moetrace, on a trace of *steps* steps."""
    source = folder / "synthetic.parquet"
    write_long(source, steps)
    everyone = {"moetrace ingest": (INGEST, source, folder / "out")}
    everyone |= {name: (code, source, folder) for name, code in ways.items()}
    rounds = [{name: timed(*way) for name, way in everyone.items()} for _ in range(TIMES)]
    source.unlink()
    lines = []
    for name in everyone:
        ratios = [runs[name].seconds / runs["moetrace ingest"].seconds for runs in rounds]
        peak = max(runs[name].peak for runs in rounds) / 2**20
        lines.append(
            f"| {LAYERS * EXPERTS * steps / 1e6:,.0f} | {name} | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {peak:,.0f} |"
        )
    return lines


def main() -> None:
    """Make, measure, print, and remove what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the large trace")
    parser.add_argument("--folder", type=Path, help="where the traces are made, and removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        print(
            "| million rows | way | times as long | lowest to highest | peak memory, MiB |\n|---:|---|---:|---:|---:|"
        )
        for steps in PANDAS_STEPS:
            print("\n".join(compared(steps, FRAMES, Path(name))))
        print("\n".join(compared(options.steps, {"pyarrow, read and write": BARE}, Path(name))))


if __name__ == "__main__":
    main()
