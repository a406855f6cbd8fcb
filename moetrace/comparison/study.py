"""Two traces compared: how far apart their loads are, and whether the plan and the set of one serve the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from moetrace.comparison.distance import Distance, Sample, distance_of, samples_of
from moetrace.comparison.transfer import transfer_of
from moetrace.errors import SettingError
from moetrace.forecasting.backtest import Progress
from moetrace.placement.planning import Planning
from moetrace.placement.step_time import BY_TOKENS, StepTime
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

# Experts whose overlap is counted where no number of slots is given: a part of those of a layer.
TOP = 4


@dataclass(frozen=True, eq=False)
class Comparison:
    """The loads of the traces *a* and *b*.

    *distance* says how far apart they are and whether that is noise, *frames* has its ``layers``, and *transfer* what a
    plan and a set from *a* do on *b*: the fields of ``transfer`` of ``compare --json``, empty if neither was asked for.
    """

    a: str
    b: str
    distance: Distance
    frames: dict[str, pd.DataFrame]
    transfer: dict[str, Any]

    @property
    def same(self) -> bool | None:
        """Whether both have one load as far as the noise floor shows, None where that is unknown."""
        return self.distance.same

    def as_row(self) -> dict[str, Any]:
        """What is said of both, without the layers and the transfer."""
        return {"a": self.a, "b": self.b} | {
            key: own for key, own in self.distance._asdict().items() if key != "layers"
        }


def compare(
    a: LoadTrace,
    b: LoadTrace,
    *,
    gpus: int | None = None,
    redundant: int = 0,
    slots: int | None = None,
    time: StepTime = BY_TOKENS,
    progress: Progress | None = None,
) -> Comparison:
    """How far apart the loads of *a* and *b* are, beyond noise, and whether what is made from one serves the other.

    Loads are the means over all steps of each: select steps first. With *gpus*, and so many *redundant* experts, a plan
    from the last 1,000 steps of *a* is scored on the second half of *b* beside *b*'s own plan, from the 1,000 steps
    before it, and the default placement, by the *time* of the busiest GPU; with *slots*, the sets of so many experts
    of every layer likewise. *progress* counts the layers of that.
    Raises `SettingError` where layers or experts are not the same number, both are steps of one trace that overlap, or
    the experts do not fill the GPUs or slots.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=6000)])
    >>> early, late = trace.select(last=3000), trace.select(first=3001)
    >>> found = mt.compare(early, late, gpus=4)
    >>> found.same, found.distance.distance < 0.03, found.transfer["slower_than_own"] < 0.03
    (False, True, True)
    """
    import pandas as pd

    check_comparable(a, b)
    planning = None if gpus is None else Planning(gpus, redundant, time=time)
    asked = gpus is not None or slots is not None
    transfer = transfer_of(a, b, planning, slots, progress) if asked else {}
    distance = distance_of(samples_of(a), samples_of(b), slots or max(1, a.experts // TOP))
    return Comparison(a.name, b.name, distance, {"layers": pd.DataFrame(distance.layers)}, transfer)


def check_comparable(a: LoadTrace, b: LoadTrace) -> None:
    """Raise `SettingError` unless both have as many layers and experts, and no step of one trace in common."""
    for what, own, other in (("layers", len(a.layers), len(b.layers)), ("experts", a.experts, b.experts)):
        if own != other:
            more = "; --layers selects some" if what == "layers" else ""
            raise SettingError(
                f"{a.name} has {own:,} {what} and {b.name} has {other:,}: loads of one shape compare{more}"
            )
    first, last = max(a.steps[0], b.steps[0]), min(a.steps[-1], b.steps[-1])
    read = [(own.info.source, own.info.fingerprint, own.info.settings) for own in (a, b)]
    one = a.digests == b.digests if a.digests else a.info.fingerprint is not None and read[0] == read[1]
    if one and first <= last:
        name, begin, end = a.name.partition(":")[0], min(a.steps[0], b.steps[0]), max(a.steps[-1], b.steps[-1])
        half = (begin + end) // 2
        raise SettingError(
            f"{a.name} and {b.name} are one trace and share the steps {first:,} to {last:,}: give parts that share "
            f"none, such as {name}:{begin}-{half} {name}:{half + 1}-{end}"
        )


def pairs_frame(traces: Sequence[LoadTrace]) -> pd.DataFrame:
    """How far apart each two of *traces* are that can be compared, a row for each pair, see `Comparison.as_row`."""
    import pandas as pd

    samples: dict[str, list[Sample]] = {}
    rows = []
    for a, b in combinations(traces, 2):
        try:
            check_comparable(a, b)
        except SettingError:
            continue
        for own in (a, b):
            samples[own.name] = samples.get(own.name) or samples_of(own)
        found = distance_of(samples[a.name], samples[b.name], max(1, a.experts // TOP))
        rows.append(Comparison(a.name, b.name, found, {}, {}).as_row())
    return pd.DataFrame(rows)
