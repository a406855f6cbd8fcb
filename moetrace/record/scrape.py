"""Scrape expert load from an endpoint of Prometheus metrics into one file, a step for each scrape.

python -m moetrace.record.scrape http://localhost:8000/metrics --every 15 -o load.prom
moetrace ingest load.prom --difference
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from moetrace.errors import MoetraceError, SettingError, TraceError

# Lines kept of a scrape: samples of a layer and an expert, and what says that their metric is a counter.
SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)\{(?=[^}]*layer)(?=[^}]*expert)[^}]*\} ", re.IGNORECASE)
# A server that answers with more is no exporter.
MOST_BYTES = 1 << 28
SECONDS = 10.0  # to wait for an answer


def scraped(url: str) -> list[str]:
    """The lines of one scrape of *url* that are about experts, and the types of their metrics.

    Raises `TraceError` if nothing answers, or no sample has labels for a layer and an expert.
    """
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            text = answer.read(MOST_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise TraceError(url, f"cannot be scraped: {error}", "check the address and that the server runs") from error
    lines = text.splitlines()
    names = {found[1] for line in lines if (found := SAMPLE.match(line))}
    if not names:
        raise TraceError(url, "has no metric with labels of a layer and an expert", "export one, or record the run")
    types = {f"# TYPE {name} " for name in names}
    return [line for line in lines if SAMPLE.match(line) or line.startswith(tuple(types))]


def scrape(
    url: str,
    path: Path,
    every: float = 15.0,
    most: int | None = None,
    *,
    wait: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda _: None,
) -> int:
    """Append a scrape of *url* to *path* every so many seconds, *most* of them; the number of scrapes.

    A scrape that fails after the first is reported and tried again when the next is due. Raises `TraceError` where the
    first one fails, `SettingError` for an address that is not of the web.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingError(f"{url!r} is no address such as http://localhost:8000/metrics")
    if every <= 0:
        raise SettingError(f"seconds between two scrapes have to be above 0, got {every}")
    done, due = 0, time.monotonic()
    while most is None or done < most:
        try:
            lines = scraped(url)
        except TraceError as error:
            if not done:
                raise
            tell(str(error))
        else:
            with path.open("a", encoding="utf-8") as file:  # one write: a kill leaves whole scrapes
                file.write("\n".join([*lines, ""]))
            done += 1
        due += every
        if most is None or done < most:
            wait(max(0.0, due - time.monotonic()))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Scrape until it is interrupted; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moetrace.record.scrape", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("url", help="address of the metrics, such as http://localhost:8000/metrics")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two scrapes (15)")
    parser.add_argument("--scrapes", type=int, help="stop after so many; until it is interrupted by default")
    parser.add_argument("-o", "--output", type=Path, default=Path("load.prom"), help="file to append to (load.prom)")
    own = parser.parse_args(argv)
    try:
        done = scrape(own.url, own.output, own.every, own.scrapes, tell=lambda text: print(text, file=sys.stderr))  # noqa: T201
        sys.stderr.write(f"{done:,} scrapes in {own.output}; next: moetrace ingest {own.output} --difference\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; next: moetrace ingest {own.output} --difference\n")
    except (MoetraceError, OSError) as error:
        sys.stderr.write(f"moetrace: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
