"""What traces are: size, source and findings, a row for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moetrace.analysis.imbalance import RECENT, max_over_mean, severity_of
from moetrace.trace import Finding, LoadTrace
from moetrace.words import OK, SEVERITIES

if TYPE_CHECKING:
    import pandas as pd


def facts_of(trace: LoadTrace) -> dict[str, Any]:
    """The size of a trace, and where it comes from: what tables and documents say alike."""
    # The worst severity of a layer over its last steps, and of several such layers that with the highest max/mean.
    shares = {load.layer: load.last(RECENT).mean_shares for load in trace.by_layer()}
    found = {layer: (SEVERITIES.index(severity_of(own)), max_over_mean(own)) for layer, own in shares.items()}
    worst = max(found, key=lambda layer: found[layer])
    severity = SEVERITIES[found[worst][0]]
    return {
        "model": trace.info.model,
        "steps": len(trace.steps),
        "first_step": int(trace.steps[0]),
        "last_step": int(trace.steps[-1]),
        "stride": trace.stride,
        "layers": len(trace.layers),
        "experts": trace.experts,
        "tokens_per_step": trace.info.tokens_per_step,
        "format": trace.info.format,
        "source": trace.info.source,
        "fingerprint": trace.info.fingerprint,
        "imbalance": OK if severity == OK else f"{severity}, layer {worst}",
    }


def traces_frame(traces: Iterable[LoadTrace]) -> pd.DataFrame:
    """One row per trace: its size, source and what was noticed."""
    return facts_frame((trace.name, facts_of(trace), [own.name for own in trace.info.findings]) for trace in traces)


def findings_frame(trace: str, findings: Iterable[Finding]) -> pd.DataFrame:
    """One row for each of the *findings* on a *trace*: its name, severity, place, evidence and advice."""
    import pandas as pd

    rows = [{"trace": trace, **vars(finding)} for finding in findings]
    return pd.DataFrame(rows, columns=["trace", *Finding.__dataclass_fields__])


def facts_frame(traces: Iterable[tuple[str, Mapping[str, Any], Iterable[str]]]) -> pd.DataFrame:
    """The same from the name, the `facts_of` and the names of the findings of each trace."""
    import pandas as pd

    rows = [{"trace": name, **facts, "findings": ", ".join(dict.fromkeys(found))} for name, facts, found in traces]
    return pd.DataFrame(rows).astype({"tokens_per_step": "Int64"} if rows else {})
