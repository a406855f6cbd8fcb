"""The catalogue of the doctor: every finding by its name, and the checks of totals, steps and counts.

A reader and the doctor both make their findings here, so that one name always means one thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.settings import unknown
from moetrace.trace import Counts, Finding, Steps, stride_of

ERROR, WARNING, NOTE = "error", "warning", "note"
# Counts that must share a factor before it is more than luck: 2**-32 for a factor of two.
LEAST_COUNTS = 32
# Totals that move by a fifth from one step to the next and stay there: a new batch size, where
# dropped tokens and ragged batches move them by a few percent.
BATCH_JUMP = 1.2
# Steps on either side of a jump that must agree before it counts as a new level.
LEVEL_STEPS = 5
# Levels that a trace may have; one with more of them varies, and no change stands out.
MOST_LEVELS = 10
# Steps in which a counter grows for each in which it is reset, and more of them in all: totals that are drawn anew
# in every step grow four times in a row in one of 120 cases. And counts that have to grow, or stay, in them.
LEAST_GROWTHS = 3
LEAST_GROWN = 12
# Steps that it takes to judge the roughness of counts.
LEAST_ROUGHNESS_STEPS = 20
# Tokens that are routed one by one differ between steps by about their square root, which makes the
# roughness about 1, and more where tokens come in topics. A sum over a window that moves on by a tenth of
# its length has 0.1; an average with a weight of 0.1 for the new step has 0.1 as well.
SMOOTH = 0.2


@dataclass(frozen=True)
class Kind:
    """What a finding of one name means: its *severity*, and what to do about it."""

    severity: str
    advice: str


KINDS: dict[str, Kind] = {
    "restart": Kind(NOTE, "nothing to do: of repeated steps, the last are used"),
    "repeated": Kind(
        ERROR, "for several replicas in one log, write one file each and use --merge sum; accept a run started again"
    ),
    "gap": Kind(WARNING, "windows and horizons are counted in steps: those across a gap have fewer rows"),
    "part": Kind(
        ERROR,
        "combine all ranks: --merge experts if each logs only its own experts, --merge sum if it logs 0 for the others",
    ),
    "empty": Kind(ERROR, "do not log idle steps, sum passes with --bin, or accept it: then such steps are left out"),
    "incomplete": Kind(ERROR, "log every layer in every step, or accept it: then such steps are left out"),
    "unfinished": Kind(WARNING, "nothing to do if the run was killed; otherwise look for the missing part"),
    "cut": Kind(NOTE, "nothing to do if the run was killed; otherwise copy the file again"),
    "idle": Kind(NOTE, "nothing to do if a data-parallel rank had no requests; otherwise look for the missing part"),
    "reset": Kind(NOTE, "nothing to do: after a reset, counters start at 0 again"),
    "wrapped": Kind(WARNING, "record with an unlimited buffer, or dump before it is full"),
    "padded": Kind(NOTE, "nothing to do: the unused end of the buffer is left out"),
    "smoothed": Kind(ERROR, "log the counts of single steps, not averages or sums over overlapping windows"),
    "cumulative": Kind(ERROR, "use --difference, or log the increase in each step"),
    "physical": Kind(ERROR, "sum the replicas of each expert, using the physical-to-logical map"),
    "rounded": Kind(WARNING, "count in 32-bit integers: half-precision floats cannot represent every integer"),
    "repeated-choice": Kind(ERROR, "leave out padding with --ignore N; accept it for hash routing, which may repeat"),
    "one-expert": Kind(WARNING, "probably a dense layer or padding: leave it out with --layers"),
    "every-token": Kind(WARNING, "probably a fused shared expert, not routed to: leave it out with --ignore N"),
    "float32": Kind(WARNING, "count in 64-bit integers, and reset the counter in every step"),
    "tokens-differ": Kind(ERROR, "check --tokens and --top-k, and look for dropped tokens and missing ranks"),
    "doubled": Kind(WARNING, "count only the first forward pass, not its recomputation; shares are not affected"),
    "multiplied": Kind(WARNING, "count on one replica only, or before the all-reduce; shares are not affected"),
    "batch-change": Kind(WARNING, "select the steps of one batch size with --steps, or compare shares only"),
    "tokens-vary": Kind(NOTE, "shares are weighted by tokens; if totals should not vary, look for dropped tokens"),
    "dead": Kind(WARNING, "the router does not choose them: check the balancing loss, or leave them out of plans"),
    "collapse": Kind(
        ERROR,
        "the router has collapsed: go back to a checkpoint before it, with a larger balancing loss or bias rate, "
        "a router z-loss, or a lower learning rate",
    ),
    "imbalance": Kind(
        WARNING, "in training, raise the weight of the balancing loss; in serving, see what `moetrace place` saves"
    ),
    "drift": Kind(WARNING, "the load still changes: plan for short horizons, and replan often"),
}  # fmt: skip


def check_known(names: Iterable[str]) -> None:
    """Raise `SettingError` for the first of *names* that is not a finding, with the known ones."""
    for name in names:
        if name not in KINDS:
            raise unknown("finding", name, KINDS)


def finding(name: str, place: str, evidence: str) -> Finding:
    """The finding *name* of the catalogue at *place*, on that *evidence*."""
    kind = KINDS[name]
    return Finding(name, kind.severity, place, evidence, kind.advice)


def raise_for_errors(findings: Sequence[Finding], accepted: Sequence[str], where: str) -> None:
    """Raise `TraceError` for the first finding that is an error and not *accepted* by its name."""
    for finding in findings:
        if finding.severity == ERROR and finding.name not in accepted:
            raise TraceError(
                f"{where}, {finding.place}",
                f"{finding.evidence} ({finding.name})",
                f"{finding.advice}; or take it as it is with --accept {finding.name}",
            )


def totals_findings(totals: Counts, steps: Steps, layers: Sequence[int]) -> list[Finding]:
    """The findings that the totals (steps, layers) of a trace lead to."""
    findings = []
    low, high, least = int(totals.min()), int(totals.max()), totals.min(axis=1)
    # Layers whose totals are always twice those of the others: their forward pass is recomputed.
    twice = [str(layers[i]) for i in np.flatnonzero((totals == 2 * least[:, None]).all(axis=0)).tolist()]
    if twice:
        evidence = f"the totals of layers {shown(twice)} are twice those of the others in every step"
        findings.append(finding("doubled", f"layer {twice[0]}", evidence))
    changes = _batch_changes(totals[:, 0], steps)
    findings += changes
    if low != high and not changes:
        evidence = f"tokens per step and layer go from {low:,} to {high:,}"
        findings.append(finding("tokens-vary", "the whole trace", evidence))
    return findings


def expectation_findings(totals: Counts, steps: Steps, layers: Sequence[int], expected: int) -> list[Finding]:
    """The finding that totals (steps, layers) are not the *expected* tokens of a layer in a step."""
    other = np.argwhere(totals != expected)
    if not other.size:
        return []
    step, layer = other[0].tolist()
    total = int(totals[step, layer])
    times = f", exactly {total // expected} times that" if total % expected == 0 else ""
    evidence = (
        f"{total:,} tokens where {expected:,} were expected{times}; so it is in {len(other):,} of {totals.size:,}"
    )
    return [finding("tokens-differ", f"step {steps[step]}, layer {layers[layer]}", f"{evidence} totals")]


def rounding_findings(kind: str, bits: int, lengths: Counts, factor: int) -> list[Finding]:
    """The finding that counts with no more than *bits* significant bits were rounded to so many, as *kind* has them.

    *lengths* is how many counts have each number of bits; all are multiples of *factor*, which may be replicas.
    """
    exact = bits + 1 + (factor & -factor).bit_length() - 1
    rounded = int(lengths[exact + 1 :].sum())
    if rounded < LEAST_COUNTS or factor & (factor - 1):
        return []
    evidence = (
        f"no count has more than {bits} significant bits, as {kind} has them: {rounded:,} counts of {1 << exact:,} and "
        "more were rounded, and tokens lost or added"
    )
    return [finding("rounded", "the whole trace", evidence)]


def factor_findings(factor: int, counts: int) -> list[Finding]:
    """The finding that *counts* counts, all of them, are multiples of *factor*."""
    if factor < 2 or counts < LEAST_COUNTS:
        return []
    name = "doubled" if factor == 2 else "multiplied"
    return [finding(name, "the whole trace", f"every one of {counts:,} counts is a multiple of {factor}")]


def _batch_changes(totals: Counts, steps: Steps) -> list[Finding]:
    """Steps at which the totals (steps,) of a layer jump to another level and stay there."""
    n = len(totals)
    ratio = totals[1:] / totals[:-1]
    jumps = np.flatnonzero((ratio >= BATCH_JUMP) | (ratio <= 1 / BATCH_JUMP)) + 1
    if len(jumps) >= min(MOST_LEVELS, n / LEVEL_STEPS):
        return []
    borders = [0, *jumps.tolist(), n]
    findings = []
    for before, at, after in zip(borders, borders[1:], borders[2:]):
        if min(at - before, after - at) >= LEVEL_STEPS:
            old, new = (int(np.median(totals[a:b])) for a, b in ((before, at), (at, after)))
            findings.append(finding("batch-change", f"step {steps[at]}", f"tokens per step go from {old:,} to {new:,}"))
    return findings


def gap_findings(steps: Steps) -> list[Finding]:
    """The finding that *steps* are missing inside the trace, if they are."""
    wide = np.flatnonzero(np.diff(steps) > stride_of(steps))
    missing = [(int(steps[i]), int(steps[i + 1])) for i in wide]
    if not missing:
        return []
    spans = shown([f"{a} to {b}" for a, b in missing], 3)
    many = "1 gap" if len(missing) == 1 else f"{len(missing)} gaps"
    evidence = f"{many} in the steps (stride {stride_of(steps)}): {spans}"
    return [finding("gap", f"after step {missing[0][0]}", evidence)]


def _growth(change: NDArray[np.int64], totals: NDArray[np.int64]) -> str:
    """What shows that counts that *change* so (steps - 1, experts) are counters; empty where they need not be.

    In steps of as many tokens no expert can win what none loses. So one count at least falls in nearly every step,
    but none of a counter that is not reset, and its total falls where it is.
    """
    falls = (change < 0).any(axis=1)
    grows = ~falls & change.any(axis=1)
    resets, growths = int(falls.sum()), int(grows.sum())
    experts = int(change.any(axis=0).sum())
    enough = growths > LEAST_GROWTHS and growths * experts >= LEAST_GROWN and growths >= LEAST_GROWTHS * resets
    if not enough or (totals[1:] >= totals[:-1])[falls].any():
        return ""
    if not resets:
        return "no count ever falls: each step holds those before it"
    return f"no count falls in {growths} of {len(change)} steps, and totals fall in the others: counters that are reset"


def roughness_findings(counts: NDArray[np.int64], steps: Steps, layer: int) -> list[Finding]:
    """Counts (steps, experts) of a layer that change less from step to step than routed tokens can.

    For tokens routed independently the sum over experts of (b - a)^2, for neighbouring counts a and b,
    is on average that of (a + b)(1 - share): the variance of two multinomial draws. Drift, topics and
    gaps only raise it.
    """
    change = np.diff(counts, axis=0)
    if evidence := _growth(change, counts.sum(axis=1)):
        return [finding("cumulative", f"layer {layer}, from step {steps[0]}", evidence)]
    if len(steps) < LEAST_ROUGHNESS_STEPS:
        return []
    both = 2 * counts.sum(axis=0) - counts[0] - counts[-1]  # (experts,)
    drawn = (both * (1 - both / both.sum())).sum()
    rough = (change.astype(np.float64) ** 2).sum() / max(1, drawn)
    if not 0 < rough < SMOOTH:
        return []
    evidence = f"counts change {rough:.2g} times as much as tokens routed one by one would (stride {stride_of(steps)})"
    return [finding("smoothed", f"layer {layer}", evidence)]
