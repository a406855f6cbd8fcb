"""Kill -9 at random moments of an ingest over an existing trace: the old trace or the new one, never anything else.

    python tests/fuzz/kills.py [50]

Every other ingest has its rows in no order, so that it is killed while it sorts on disk, too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moetrace import TraceError, Workspace, open_trace

STEPS, LAYERS, EXPERTS = 10_000, 4, 32
INGEST = """
import sys
from pathlib import Path
import pyarrow.dataset, pyarrow.parquet
from moetrace import Workspace
print("ready", flush=True)
Workspace(Path(sys.argv[2])).ingest(Path(sys.argv[1]), name="trace", force=True)
print("done", flush=True)
"""


def sources(folder: Path) -> dict[Path, np.ndarray]:
    """Two dumps of unlike traces, one in the order of its steps and one in none, and their counts."""
    rng = np.random.default_rng(0)
    made = {}
    for name in ("ordered", "shuffled"):
        counts = rng.multinomial(500, np.full(EXPERTS, 1 / EXPERTS), size=(STEPS, LAYERS))
        step, layer, expert = (index.ravel() for index in np.indices(counts.shape))
        table = pa.table({"step": step + 1, "layer": layer, "expert": expert, "tokens": counts.ravel()})
        order = np.arange(len(table)) if name == "ordered" else rng.permutation(len(table))
        pq.write_table(table.take(order), folder / f"{name}.parquet")
        made[folder / f"{name}.parquet"] = counts
    return made


def started(source: Path, place: Workspace) -> subprocess.Popen[bytes]:
    """An ingest that has loaded its libraries and is about to read."""
    child = subprocess.Popen([sys.executable, "-c", INGEST, source, place.root], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def outcomes(kills: int, folder: Path, seed: int = 0) -> list[str]:
    """What was there after each kill: old, new, or what was wrong; and whether anything is left at the end."""
    place = Workspace(folder / "out")
    dumps = sources(folder)
    old, new = dumps
    took = {}
    for source in (new, old):
        child = started(source, place)
        began = time.perf_counter()
        child.communicate()
        took[source] = time.perf_counter() - began
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(kills):
        child = started(new, place)
        time.sleep(rng.uniform(0, took[new]))
        child.kill()
        child.communicate()
        found.append(_state(place, dumps[old], dumps[new]))
        if found[-1] == "new":
            old, new = new, old
    place.ingest(old, name="trace", force=True)
    left = sorted(path.name for path in (place.root / "traces").iterdir())
    return found + ([] if left == ["trace.parquet"] else [f"left: {left}"])


def _state(place: Workspace, old: np.ndarray, new: np.ndarray) -> str:
    try:
        counts = open_trace(place.trace_path("trace")).counts
    except TraceError as error:
        return str(error)
    known = {"old": old, "new": new}
    return next((name for name, expected in known.items() if np.array_equal(expected, counts)), "WRONG")


def main() -> int:
    """Kill, count, print."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as name:
        counts = Counter(outcomes(kills, Path(name)))
    print(f"{kills} kills: {', '.join(f'{n} {what}' for what, n in counts.most_common())}")
    return int(bool(set(counts) - {"old", "new"}))


if __name__ == "__main__":
    sys.exit(main())
