"""Every registered reader on damaged dumps, for FUZZ_SECONDS: read or refused in one line, nothing else.

    FUZZ_SECONDS=60 python tests/fuzz/readers.py [first seed]

A seed decides the format and what is done to its dump: bits flipped, pieces cut, doubled or exchanged with other
dumps, numbers made huge, files renamed. Cases run in a child, so that an abort of a library is survived and
counted. What went wrong is kept in tests/fuzz/cases, which `make test` reads again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CASES = Path(__file__).parent / "cases"
GOOD = {"read", "refused"}
# What one case may take.
SECONDS = 20
GROWTH = 1 << 30
SPECIAL = (
    0,
    1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
NUMBERS = (
    b"-1",
    b"0",
    b"1e308",
    b"NaN",
    b"null",
    b"999999999999999999999",
    b"9223372036854775807",
    b"1.5",
    b'""',
    b"[]",
)


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """*data* with one to four things done to it."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        dice.choice((_flip, _cut, _end, _double, _exchange, _number, _text))(changed, others, dice)
    return bytes(changed)


def _span(data: bytearray, dice: random.Random) -> slice:
    start = dice.randrange(len(data) + 1)
    return slice(start, min(len(data), start + int(2 ** dice.uniform(0, 10))))


def _flip(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    for _ in range(dice.choice((1, 1, 8)) if data else 0):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _cut(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    del data[_span(data, dice)]


def _end(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _double(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    span = _span(data, dice)
    data[span.start : span.start] = data[span]


def _exchange(data: bytearray, others: list[bytes], dice: random.Random) -> None:
    other = bytearray(dice.choice(others))
    data[_span(data, dice)] = other[_span(other, dice)]


def _number(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    """A special number over what is there, in the width of a machine's."""
    width = dice.choice((1, 2, 4, 8))
    start = dice.randrange(len(data) + 1)
    value = dice.choice(SPECIAL) % 2 ** (8 * width)
    data[start : start + width] = value.to_bytes(width, dice.choice(("little", "big")))


def _text(data: bytearray, _others: list[bytes], dice: random.Random) -> None:
    """A strange number in the place of one in a text."""
    digits = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if digits:
        start = dice.choice(digits)
        data[start : start + 1] = dice.choice(NUMBERS)


def damage(path: Path, seed: int, others: list[bytes]) -> Path:
    """Change one file of the dump *path*, rarely its name; returns the dump's path."""
    dice = random.Random(seed)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = dice.choice(files)
    file.write_bytes(mutated(file.read_bytes(), others, dice))
    if dice.random() < 0.1:
        other = file.with_suffix(dice.choice((".csv", ".parquet", ".npz", ".jsonl", ".npy", ".tsv", ".csv.gz")))
        file.rename(other)
        return other if file == path else path
    return path


def outcome(path: Path, format: str | None) -> str:
    """What became of reading *path*: read, refused, or what went wrong."""
    from moetrace import TraceError, read_trace

    before = _peak()
    try:
        read_trace(path, format=format).counts.sum()
        said = "read"
    except TraceError as error:
        said = "refused" if "\n" not in str(error) else "more than a line"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        said = type(error).__name__
    return said if _peak() - before < GROWTH else "much memory"


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def child(first: int, folder: Path) -> None:
    """Cases from seed *first* on, a line for each; the dump of the present one lies in the folder *case*."""
    import signal
    import warnings

    warnings.simplefilter("error")
    dumps = dumps_in(folder)
    others = contents(folder)
    names = list(dumps)
    for seed in range(first, sys.maxsize):
        name = names[seed % len(names)]
        shutil.rmtree(folder / "case", ignore_errors=True)
        shutil.copytree(dumps[name].parent, folder / "case")
        path = damage(folder / "case" / dumps[name].name, seed, others)
        print(seed, name, end=" ", flush=True)
        signal.alarm(SECONDS)
        print(outcome(path, name.partition("+")[0] if seed % 3 else None).replace(" ", "-"), flush=True)
        signal.alarm(0)


def make_dumps(folder: Path) -> None:
    """A dump of every format whose library is here, in every form, each in a folder of its own."""
    import numpy as np
    import pytest
    from dumps import DUMPS, FORMS

    from moetrace import LoadTrace

    trace = LoadTrace.from_counts(
        np.random.default_rng(0).multinomial(40, [0.4, 0.3, 0.2, 0.1], size=(6, 2)), steps=np.arange(10, 16)
    )
    for name, make in {**DUMPS, **FORMS}.items():
        inside = folder / name
        inside.mkdir()
        try:
            make(trace, inside)
        except (ImportError, pytest.skip.Exception):
            shutil.rmtree(inside)


def dumps_in(folder: Path) -> dict[str, Path]:
    """The dumps that `make_dumps` made, by the names of their formats."""
    inside = sorted(path for path in folder.iterdir() if path.name != "case")
    return {path.name: min(path.iterdir()) for path in inside}


def contents(folder: Path) -> list[bytes]:
    """What all of their files hold."""
    files = (file for dump in dumps_in(folder).values() for file in sorted(dump.parent.rglob("*")) if file.is_file())
    return [file.read_bytes() for file in files]


def cases(first: int, seconds: float, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Seed, format and outcome of case after case, for some *seconds*; children are begun anew where they end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run = subprocess.Popen(
            [sys.executable, __file__, "--child", str(first), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert run.stdout is not None
        line = ""
        for line in run.stdout:
            seed, name, *said = line.split()
            first = int(seed) + 1
            found = said[0] if said else "aborted"
            # An abort inside pyarrow is listed by its seed: read again by `make test` it would abort that.
            if found not in GOOD | {"aborted"}:
                _keep(folder, name, int(seed))
            yield int(seed), name, found
            if time.monotonic() > end:
                break
        run.kill()
        run.communicate()


def _keep(folder: Path, name: str, seed: int) -> None:
    """Make the case anew, since the child has gone on, and keep it."""
    dump = dumps_in(folder)[name]
    kept = CASES / f"{name}-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(dump.parent, kept)
    damage(kept / dump.name, seed, contents(folder))


def main() -> int:
    """Fuzz, count, print."""
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), Path(sys.argv[3]))
    sys.path.insert(0, str(Path(__file__).parent.parent))
    first = int(sys.argv[1]) if len(sys.argv) > 1 else time.time_ns() // 1000 % 10**9
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        make_dumps(Path(folder))
        for seed, name, found in cases(first, float(os.environ.get("FUZZ_SECONDS", "60")), Path(folder)):
            counts[name, found] += 1
            if found not in GOOD:
                print(f"seed {seed}, {name}: {found}")
    print(f"{counts.total():,} damaged dumps from seed {first} on")
    for (name, found), n in sorted(counts.items()):
        print(f"  {name}: {n:,} {found}")
    return int(any(found not in GOOD | {"aborted"} for _, found in counts))


if __name__ == "__main__":
    sys.exit(main())
