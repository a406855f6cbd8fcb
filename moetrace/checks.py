"""The trace doctor: what is odd about a trace, as named findings with evidence and advice."""

from __future__ import annotations

from moetrace.trace import Finding, LayerLoad, LoadTrace

# Steps at the end of a trace that are looked at for experts out of work.
RECENT = 1000
# A layer is collapsed when one expert has this share of the load and there are more than two.
COLLAPSED_SHARE = 0.9


def examine(trace: LoadTrace) -> list[Finding]:
    """All findings of *trace*: those its readers made and those its counts show.

    Reads every layer once, and so also finds damage: raises `TraceError` for it.
    """
    found = list(trace.info.findings)
    totals = set()
    for load in trace.by_layer():
        found += _idle_experts(load)
        totals |= {int(load.totals.min()), int(load.totals.max())}
    if len(totals) > 1:
        found.append(
            Finding(
                "tokens-vary",
                "note",
                "the whole trace",
                f"tokens per step and layer go from {min(totals):,} to {max(totals):,}",
                "shares are weighted by tokens; check the batch size, dropped tokens or a missing rank",
            )
        )
    return found


def _idle_experts(load: LayerLoad) -> list[Finding]:
    recent = load.last(RECENT).counts.sum(axis=0)
    shares = recent / recent.sum()
    found = []
    dead = [str(expert) for expert in (recent == 0).nonzero()[0]]
    if dead:
        found.append(
            Finding(
                "dead",
                "warning",
                f"layer {load.layer}",
                f"no token in the last {RECENT} steps for experts {', '.join(dead[:8])}{', ...' if dead[8:] else ''}",
                "the router ignores them: look at the balancing loss, or drop them from the placement",
            )
        )
    if len(shares) > 2 and shares.max() > COLLAPSED_SHARE:
        found.append(
            Finding(
                "collapse",
                "warning",
                f"layer {load.layer}",
                f"expert {shares.argmax()} has {100 * shares.max():.0f} % of the load of the last {RECENT} steps",
                "the router has collapsed: look at the balancing loss and the learning rate",
            )
        )
    return found
