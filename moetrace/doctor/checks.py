"""The trace doctor: problems of a trace, as named findings with evidence and advice."""

from __future__ import annotations

import numpy as np

from moetrace.analysis.noise import mean_noise
from moetrace.analysis.severity import health
from moetrace.doctor.catalogue import ERROR, finding, gap_findings, roughness_findings, totals_findings
from moetrace.doctor.collector import Factor
from moetrace.errors import shown
from moetrace.trace import Counts, Finding, LayerLoad, LoadTrace
from moetrace.words import COLLAPSED, SEVERE

# Steps at the end of a trace that are checked for idle experts, and for drift.
RECENT = 1000
# Shares that differ by a tenth between the last RECENT steps and those before: a layer that counts as
# stable, moving by less than 4% in 200 steps, stays below 9% in 1,000.
DRIFTED = 0.1
# Counts of a layer that are checked for roughness: enough for an answer, and quick.
ROUGH_COUNTS = 1 << 20


def examine(trace: LoadTrace) -> list[Finding]:
    """All findings of *trace*: those of its readers and those that its counts lead to.

    Reads every layer once. Raises `TraceError` for a damaged one.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> [finding.name for finding in mt.examine(trace)]
    []
    """
    known = list(trace.info.findings)
    names = {finding.name for finding in known}
    findings: list[Finding] = []
    totals: list[Counts] = []
    factor = Factor()
    for load in trace.by_layer():
        unhealthy = idle_experts(load)
        # Of a router that has collapsed, the load need not be planned for.
        findings += unhealthy if any(own.name == "collapse" for own in unhealthy) else [*unhealthy, *_drift(load)]
        rows = max(2, ROUGH_COUNTS // load.experts)
        findings += roughness_findings(load.counts[:rows], load.steps[:rows], load.layer)
        totals.append(load.totals)
        factor.add(load.counts, int(load.counts.max()))
    findings += [] if "rounded" in names else factor.findings
    findings += totals_findings(np.stack(totals, axis=1), trace.steps, trace.layers)
    findings += gap_findings(trace.steps)
    return known + [finding for finding in findings if finding.name not in names]


def failing(findings: list[Finding], trace: LoadTrace, fail_on: tuple[str, ...] = ()) -> list[Finding]:
    """The findings that fail a check: those named in *fail_on*, and errors that nobody accepted at ingest."""
    accepted = trace.info.settings.get("accept", [])
    return [
        finding
        for finding in findings
        if finding.name in fail_on or (finding.severity == ERROR and finding.name not in accepted)
    ]


def idle_experts(load: LayerLoad) -> list[Finding]:
    """The findings ``dead``, ``collapse`` and ``imbalance`` of the last `RECENT` steps of a layer."""
    recent, found, place = load.last(RECENT).counts.sum(axis=0), health(load, RECENT), f"layer {load.layer}"
    since = "" if found.since is None else f", since step {found.since}"
    findings = []
    dead = [str(expert) for expert in load.expert_numbers[recent == 0]]
    if dead:
        findings.append(finding("dead", place, f"no token in the last {RECENT} steps for experts {shown(dead)}"))
    evidence = (
        f"expert {found.hottest} has {100 * found.hottest_share:.0f}% of the load of the last {RECENT} steps, "
        f"{found.max_over_mean:.1f}x the mean, and {100 * found.in_use:.0f}% of the experts are in use{since}"
    )
    name = {COLLAPSED: "collapse", SEVERE: "imbalance"}.get(found.severity)
    return findings + ([finding(name, place, evidence)] if name else [])


def _drift(load: LayerLoad) -> list[Finding]:
    """The shares of the last two windows, further apart than the noise of their means explains."""
    rows = load.rows(RECENT)
    if len(load.steps) < 2 * rows:
        return []
    before, after = load.until(int(load.steps[-1]) - RECENT).last(RECENT), load.last(RECENT)
    # Two means, each with its own noise; unknown noise counts as none.
    noise = float(np.nan_to_num(mean_noise(load.last(2 * RECENT), rows))) * 2**0.5
    moved = float(np.abs(after.mean_shares - before.mean_shares).sum())
    drift = max(0.0, moved**2 - noise**2) ** 0.5
    if drift <= DRIFTED:
        return []
    evidence = f"the shares of the last {RECENT} steps differ by {100 * drift:.0f}% from those of the {RECENT} before"
    return [finding("drift", f"layer {load.layer}", evidence)]
