"""Every bit of a small canonical file flipped, a thousand in the data of a larger one, and a dump's whole footer.

    python tests/fuzz/flips.py

What comes of each flip: the trace as it was, a refusal in one line, other numbers (WRONG), anything else that
Python raised (the name of its type), or an abort of the process inside the Parquet library. Prints how many of
each, and fails for all but the first two; aborts are listed by their place. A dump of another program has no
digests, so a flip in its footer may also give other numbers: no reader could tell.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moetrace import LoadTrace, read_trace, save_trace

Place = tuple[int, int]

# A flipped bit can abort the process inside the Parquet library, so flips are tried in a child.
CHILD = """
import sys
import numpy as np
from moetrace import TraceError, open_trace, read_trace

path, expected = sys.argv[1], np.load(sys.argv[2])
data = bytearray(open(path, "rb").read())
opened, changed = (open_trace, "WRONG") if sys.argv[3] == "ours" else (read_trace, "other numbers")
first = opened(path)
for place in sys.stdin:
    byte, bit = map(int, place.split())
    data[byte] ^= 1 << bit
    with open(path, "r+b") as file:
        file.seek(byte)
        file.write(data[byte:byte + 1])
    try:
        trace = opened(path)
        same = np.array_equal(trace.counts, expected) and trace.info == first.info
        same = same and np.array_equal(trace.steps, first.steps) and trace.layers == first.layers
        print("same" if same else changed, flush=True)
    except TraceError as error:
        print("refused" if "\\n" not in str(error) else "lines", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
    data[byte] ^= 1 << bit
    with open(path, "r+b") as file:
        file.seek(byte)
        file.write(data[byte:byte + 1])
"""


def outcomes(path: Path, places: Sequence[Place], folder: Path, whose: str = "ours") -> list[str]:
    """What became of the trace in *path* after each single flipped bit, as the page above has it."""
    np.save(folder / "expected.npy", read_trace(path).counts)
    found: list[str] = []
    while len(found) < len(places):
        copy = folder / "flipped.parquet"
        copy.write_bytes(path.read_bytes())
        child = subprocess.run(
            [sys.executable, "-c", CHILD, copy, folder / "expected.npy", whose],
            input="".join(f"{byte} {bit}\n" for byte, bit in places[len(found) :]),
            capture_output=True,
            text=True,
        )
        found += child.stdout.splitlines()
        if child.returncode:
            assert child.returncode < 0, child.stderr
            found.append("aborted")
    return found


def small_trace() -> LoadTrace:
    """Two layers of four experts over 20 steps."""
    counts = np.random.default_rng(1).multinomial(100, [0.4, 0.3, 0.2, 0.1], size=(20, 2))
    return LoadTrace.from_counts(counts, name="small", steps=np.arange(10, 30), layers=[3, 5])


def large_trace() -> LoadTrace:
    """Four layers of 64 experts over 1,000 steps."""
    counts = np.random.default_rng(2).multinomial(5000, np.full(64, 1 / 64), size=(1000, 4))
    return LoadTrace.from_counts(counts, name="large")


def dump(trace: LoadTrace, path: Path) -> range:
    """The trace as another program writes it, a list for each step and layer; where its footer lies."""
    loads = list(trace.by_layer())
    rows = [(int(step), load.layer, load.counts[i].tolist()) for i, step in enumerate(trace.steps) for load in loads]
    pq.write_table(pa.table(dict(zip(("step", "layer", "counts"), map(list, zip(*rows))))), path)
    data = path.read_bytes()
    return range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data))


def main() -> int:
    """Flip, count, print."""
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large, foreign = (folder / f"{name}.parquet" for name in ("small", "large", "foreign"))
        save_trace(small_trace(), small)
        save_trace(large_trace(), large)
        rng = np.random.default_rng(3)
        data = range(4, large.stat().st_size * 9 // 10)
        every = [(byte, bit) for byte in range(small.stat().st_size) for bit in range(8)]
        some = [(int(rng.choice(data)), int(rng.integers(8))) for _ in range(1000)]
        footer = [(byte, bit) for byte in dump(small_trace(), foreign) for bit in range(8)]
        for title, path, places, whose in (
            ("every bit of a small file", small, every, "ours"),
            ("data of a larger one", large, some, "ours"),
            ("footer of a dump with lists", foreign, footer, "foreign"),
        ):
            found = outcomes(path, places, folder, whose)
            counts = Counter(found)
            print(f"{title}, {len(found):,} flips: {', '.join(f'{n:,} {what}' for what, n in counts.most_common())}")
            print(
                *(f"  aborted: byte {places[i][0]}, bit {places[i][1]}" for i, f in enumerate(found) if f == "aborted"),
                sep="\n",
                end="",
            )
            fine = {"same", "refused", "aborted", *(["other numbers"] if whose == "foreign" else [])}
            bad += sum(n for what, n in counts.items() if what not in fine)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
