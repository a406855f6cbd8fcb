"""Transient or stable: from which step on the load of a layer has settled.

The rule compares the mean load of one window with that of the next, subtracts what sampling noise alone
would add to the difference, and calls the layer stable from where that *movement* stays small. Noise is
measured in the trace itself, so tokens per step, topics that sequences share and the number of
experts do not change the answer. A second detector looks only at the order of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moetrace.analysis.movement import (
    Changes,
    border_steps,
    level_shift,
    mean_over_hold,
    movement,
    window_blocks,
)
from moetrace.analysis.variogram import BLOCK, SHARE_FLOOR, block_means, cached_per_layer, expected_movement
from moetrace.trace import LayerLoad, Shares, Steps
from moetrace.words import STABLE, TRANSIENT, UNKNOWN

SETTLED = "settled"
FROM_START = "stable from the start"
NEVER = "never settled"
AGAIN = "unsettled again"


@dataclass(frozen=True)
class Rule:
    """The numbers of the state rule.

    *window*: the steps of each of the two windows compared; 200 is the longest window that the paper judged by eye.
    *hold*: movement is averaged over this many steps before it is judged, so that one lucky comparison neither settles
    a layer nor unsettles it. *settle_below*, *unsettle_above*: root mean square movement. On the sample traces it falls
    from 10 to 25 % to about 2 % in the layers that look settled to the eye; 4 and 6 % lie between, on either side of
    the geometric mean. `benchmarks/states.py` shows how right the rule is on layers whose settle step is known.
    """

    window: int = 200
    hold: int = 500
    settle_below: float = 0.04
    unsettle_above: float = 0.06


RULE = Rule()
# A single expert has one degree of freedom where a layer of 8 has 7: it is averaged four times as long.
EXPERT_RULE = replace(RULE, hold=2000)
# The interval of a settle step reaches from where movement was last clearly above the rule, by this factor, to where it
# first is clearly below, and one block further: about the width of the transition (`benchmarks/states.py`).
CLEARLY = 2.0
# What rank correlation loses from one window to the next beyond the noise: 0.01 and more where a synthetic layer moves
# by over 6 % a window, 0.003 and less below 4 %. Ranks say less than loads, so they are averaged twice as long.
RANKS_SETTLE_BELOW = 0.005
RANKS_UNSETTLE_ABOVE = 0.01
NOISE_MARGIN = 1.5
RANK_RULE = replace(RULE, hold=1000)
# What the variogram expects of the next 1,000 steps of a layer that is stable at a cutoff is as small: on gpt-moe-8e-a
# that is 4 to 30 % up to step 2,500 and below 4 % from step 3,250 on.
PROMISED_STEPS = 1000
PROMISE = 0.04
# Steps that the state at a cutoff is read from, and twice as many as long as they do not decide it.
LOOKED_BACK = 50_000


class Run(NamedTuple):
    """Steps from *from_step* to *to_step*, both included, in one *state*."""

    from_step: int
    to_step: int
    state: str


@dataclass(frozen=True, eq=False)
class LayerStates:
    """The states of one layer.

    *runs* follow each other without a gap. *settle_interval* are the first and the last step that the settle step may
    well be, None if the layer never settles; *unsettled_interval* those of the step from which a layer that settled is
    unstable again. *span* is the length of a window. *movement* at *steps*, both (moments,), is the relative movement
    from the window before each step to the one after, noise taken off; *judged*, shorter, is its root mean square over
    the hold from each step on, which the rule holds against its thresholds.
    """

    trace: str
    layer: int
    runs: tuple[Run, ...]
    settle_interval: tuple[int, int] | None
    unsettled_interval: tuple[int, int] | None
    span: int
    steps: Steps
    movement: NDArray[np.float64]
    judged: NDArray[np.float64]

    @property
    def state(self) -> str:
        """The state at the end."""
        return self.runs[-1].state

    @property
    def settle_step(self) -> int | None:
        """The first step from which the layer stays stable, None if it never settles."""
        return settle_step_of(self.runs)

    @property
    def outcome(self) -> str:
        """In words: `SETTLED`, `FROM_START`, `NEVER` or `AGAIN`; `UNKNOWN` where there is too little data."""
        always, changed = {STABLE: (FROM_START, SETTLED), TRANSIENT: (NEVER, AGAIN)}.get(self.state, (UNKNOWN, UNKNOWN))
        return changed if len(self.runs) > 1 else always

    @property
    def unsettled_step(self) -> int | None:
        """Where a layer that is unsettled again left the stable state; None for any other."""
        return self.runs[-1].from_step if self.outcome == AGAIN else None

    def movement_in(self, first: int, last: int) -> float:
        """Root mean square movement of windows that lie between two steps; NaN where there are none."""
        inside = self.movement[(self.steps >= first + self.span) & (self.steps + self.span - 1 <= last)]
        return float(np.sqrt(np.mean(np.square(inside)))) if inside.size else float("nan")


def settle_step_of(runs: tuple[Run, ...]) -> int | None:
    """The start of the last run if that is stable."""
    return runs[-1].from_step if runs[-1].state == STABLE else None


def classify(load: LayerLoad, rule: Rule = RULE) -> LayerStates:
    """The states of a layer by the movement of its load, with hindsight.

    Windows and the hold are counted in rows where they would hold too few. A layer too short to judge, less than
    twice the window and the hold together, is transient where it moves, and else unknown, because a layer is
    called stable only on evidence; so is one whose rows are further apart than a window. A border between two states
    lies where the load changed.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> found = mt.classify(trace.layer(0))
    >>> found.state, found.settle_step is not None
    ('stable', True)
    """
    steps, squared, judged, blurred = found = _judged(load, rule)
    runs, located_by = _located(load, rule, blurred)
    intervals = _intervals(load, rule, runs, located_by, found)
    moved, mean = (np.sqrt(np.maximum(values, 0)) for values in (squared, judged))
    return LayerStates(load.trace, load.layer, runs, *intervals, _span(load, rule), steps, moved, mean)


class _Judged(NamedTuple):
    """What the rule sees: squared movement at *steps*, both (moments,), and *judged*, its mean over the hold.

    The borders of the *runs* that follow are blurred by the hold.
    """

    steps: Steps
    squared: NDArray[np.float64]
    judged: NDArray[np.float64]
    runs: tuple[Run, ...]


def _judged(load: LayerLoad, rule: Rule) -> _Judged:
    steps, squared, noise = movement(load, rule.window)
    judged, low, high = mean_over_hold(load, squared, rule.hold), rule.settle_below**2, rule.unsettle_above**2
    runs: tuple[Run, ...]
    if not judged.size:
        moves = squared.size > 0 and squared.mean() > high
        runs = (Run(int(load.steps[0]), int(load.steps[-1]), TRANSIENT if moves else UNKNOWN),)
    else:
        # Squared noise scatters as a chi-square of E - 1 degrees of freedom does; a hold has as many independent
        # comparisons as windows fit into it.
        rows, k = window_blocks(load, rule.window)
        independent = max(1.0, rule.hold / (rows * k * load.stride))
        unknown = noise.mean() * np.sqrt(2 / max(1, load.experts - 1) / independent) > low
        runs = _runs(load, steps, np.empty(0, np.bool_) if unknown else _hysteresis(judged, low, high))
    return _Judged(steps, squared, judged, runs)


# How the begin of a run was located: by the rule, at a border of the movement, or at a jump of the level.
RULED, BORDER, JUMP = "rule", "border", "jump"


def _span(load: LayerLoad, rule: Rule) -> int:
    """The length of a window in steps, where rows are far apart more than the rule has."""
    rows, k = window_blocks(load, rule.window)
    return max(rule.window, rows * k * load.stride)


def _located(load: LayerLoad, rule: Rule, runs: tuple[Run, ...]) -> tuple[tuple[Run, ...], str]:
    """The same *runs* with their borders where the load changed, and how the begin of the last one was located."""
    if len(runs) < 2:
        return runs, RULED
    # The rule sees a change a hold before it, and forgets it two windows after it; no border passes another.
    changes, before, after = Changes(load), 2 * rule.window, rule.hold + 2 * rule.window
    block, begins = max(BLOCK, load.stride), [(runs[0].from_step, RULED, runs[0].state)]
    for number, (from_step, latest, state) in enumerate(runs):
        if number + 1 < len(runs):
            latest = (from_step + runs[number + 1].from_step) // 2 + rule.hold
        earliest = begins[-1][0] + block
        jump = _jump(load, rule, runs, number) if state == TRANSIENT else None
        if jump is not None and jump > earliest:
            # A run that is transient only for a jump of the level is as long as a block, and ends with the jump.
            stable_before = [(runs[0].from_step, RULED, STABLE)] if number == 0 else begins
            begins = [*stable_before, (jump - block, JUMP, TRANSIENT), (jump, JUMP, STABLE)]
        elif number and begins[-1][2] != state:
            first, last = max(earliest, from_step - before), min(from_step + after, latest)
            found = changes.border(first, last, falls=state == STABLE)
            begins.append((max(earliest, from_step), RULED, state) if found is None else (found, BORDER, state))
    ends = [*(begin - 1 for begin, _, _ in begins[1:]), runs[-1].to_step]
    return tuple(Run(a, b, state) for (a, _, state), b in zip(begins, ends)), begins[-1][1]


def _jump(load: LayerLoad, rule: Rule, runs: tuple[Run, ...], number: int) -> int | None:
    """The first step after a jump of the level, where a transient run before a stable one holds nothing else."""
    span, run = 2 * _span(load, rule), runs[number]
    if number + 1 == len(runs):
        return None
    first = run.from_step if number == 0 else max(run.from_step - span, runs[number - 1].from_step)
    part = load.between(first, min(run.to_step + span, runs[number + 1].to_step))
    at = level_shift(part)
    for side in (part.between(first, at - 1), part.between(at, int(part.steps[-1]))):
        squared = movement(side, rule.window)[1] if len(side.steps) else np.empty(0)
        if not squared.size or squared.mean() > rule.unsettle_above**2:
            return None
    return at


def classify_expert(load: LayerLoad, expert: int) -> LayerStates:
    """The states of one *expert* of a layer: of its share against that of all the others together.

    The movement of such a pair is that of the expert, relative to its own share p, times
    ``sqrt(p / (1 - p))``; the thresholds are scaled to it.
    """
    own = load.counts[:, expert]
    pair = replace(load, counts=np.stack([own, load.totals - own], axis=1))
    share = float(np.clip(pair.mean_shares[0], SHARE_FLOOR / load.experts, 1 - SHARE_FLOOR))
    scale = (share / (1 - share)) ** 0.5
    low, high = EXPERT_RULE.settle_below * scale, EXPERT_RULE.unsettle_above * scale
    return classify(pair, replace(EXPERT_RULE, settle_below=low, unsettle_above=high))


def rank_runs(load: LayerLoad, rule: Rule = RANK_RULE) -> tuple[Run, ...]:
    """The states of a layer by the order of its experts alone; a second opinion on `classify`.

    The Spearman correlation of the loads of two adjacent windows falls short of 1 by movement and by
    noise. That of the even and the odd blocks of the same steps falls short by noise only. The difference
    between the two is judged.
    """
    rows, k = window_blocks(load, rule.window)
    means = block_means(load, rows)
    if len(means) < 2 * k or load.stride > rule.window or load.experts < 2:
        return _runs(load, np.empty(0, np.int64), np.empty(0, np.bool_))
    both = sliding_window_view(means, 2 * k, axis=0)  # (moments, experts, 2k)
    adjacent = rank_correlation(both[..., :k].mean(axis=-1), both[..., k:].mean(axis=-1))
    interleaved = rank_correlation(both[..., ::2].mean(axis=-1), both[..., 1::2].mean(axis=-1))
    lost = (1 - adjacent) - NOISE_MARGIN * (1 - interleaved)
    judged = mean_over_hold(load, lost, rule.hold)
    return _runs(load, border_steps(load, rows, k), _hysteresis(judged, RANKS_SETTLE_BELOW, RANKS_UNSETTLE_ABOVE))


@cached_per_layer
def state_at(load: LayerLoad, cutoff: int) -> str:
    """The state of a layer as known at the *cutoff*, using no later step: can a plan be made ahead?

    Stable is what does not move and is not expected to: the variogram up to the cutoff says that the error of a good
    forecast of the next `PROMISED_STEPS` steps is no more than `PROMISE`. A load that stands still from one window to
    the next may still wander over longer distances.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)])
    >>> mt.state_at(trace.layer(0), 500), mt.state_at(trace.layer(0), 4000)
    ('transient', 'stable')
    """
    history = load.until(cutoff)
    state = _state_now(history, RULE)
    if state == STABLE and expected_movement(history, PROMISED_STEPS) > PROMISE:
        return TRANSIENT
    return state


def _state_now(history: LayerLoad, rule: Rule, looked_back: int = LOOKED_BACK) -> str:
    """The state at the end: of what was *looked_back* at, if it was below or above the rule there at all."""
    recent = history.last(looked_back)
    found = _judged(recent, rule)
    decided = (found.judged < rule.settle_below**2) | (found.judged > rule.unsettle_above**2)
    if decided.any() or len(recent.steps) == len(history.steps):
        return found.runs[-1].state
    return _state_now(history, rule, 2 * looked_back)


def rank_correlation(a: Shares, b: Shares, still: float = 1.0) -> NDArray[np.float64]:
    """Spearman's, of each row of *a* with that of *b*, both (rows, experts); *still* where all of a row are equal."""
    import pandas as pd

    # Equal loads, as those of dead experts, have the mean of their ranks.
    x, y = (pd.DataFrame(side).rank(axis=1).to_numpy() - (a.shape[1] + 1) / 2 for side in (a, b))
    norm = np.sqrt(np.square(x).sum(axis=1) * np.square(y).sum(axis=1))
    correlation: NDArray[np.float64] = np.divide((x * y).sum(axis=1), norm, out=np.full(len(a), still), where=norm > 0)
    return correlation


def _hysteresis(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.bool_]:
    """True from where *values* fall below *low* until they rise above *high*, shape of *values*."""
    decided = np.where(values < low, 1, np.where(values > high, 0, -1))
    last_decided = np.maximum.accumulate(np.where(decided >= 0, np.arange(len(values)), -1))
    stable: NDArray[np.bool_] = (last_decided >= 0) & (decided[last_decided] == 1)
    return stable


def _runs(load: LayerLoad, steps: Steps, stable: NDArray[np.bool_]) -> tuple[Run, ...]:
    """Runs of one state over all of *load*; each begins at the moment its state does. Unknown if never judged."""
    first, last = int(load.steps[0]), int(load.steps[-1])
    if not stable.size:
        return (Run(first, last, UNKNOWN),)
    starts = np.flatnonzero(np.diff(stable, prepend=~stable[:1]))
    begins = [first, *(int(steps[i]) for i in starts[1:])]
    ends = [*(begin - 1 for begin in begins[1:]), last]
    states = [STABLE if stable[i] else TRANSIENT for i in starts]
    return tuple(Run(a, b, state) for a, b, state in zip(begins, ends, states))


def _intervals(
    load: LayerLoad, rule: Rule, runs: tuple[Run, ...], located_by: str, found: _Judged
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Between which steps a layer may well have settled, and become unstable again; None where it did not."""
    first, end = int(load.steps[0]), int(load.steps[-1])
    begin, block, span = runs[-1].from_step, max(BLOCK, load.stride), _span(load, rule)
    if runs[-1].state == TRANSIENT and len(runs) > 1:
        # Where movement has no sudden border, the rule sees the change up to a hold and two windows before it.
        early, late = (block, 2 * block) if located_by == BORDER else (span, rule.hold + 2 * span)
        return None, (max(first, begin - early), min(end, begin + late))
    judged = settle_step_of(found.runs)
    if runs[-1].state != STABLE or judged is None:
        return None, None
    if begin == first:
        return (first, first), None
    if located_by == JUMP:
        return (max(first, begin - block), min(end, begin + block)), None
    i = int(np.searchsorted(found.steps, judged))
    above = np.flatnonzero(found.judged[:i] > (CLEARLY * rule.unsettle_above) ** 2)
    below = np.flatnonzero(found.judged[i:] < (rule.settle_below / CLEARLY) ** 2)
    low = int(found.steps[above[-1]]) - block if above.size else first
    high = int(found.steps[i + below[0]]) + block if below.size else begin + rule.hold
    return (max(first, min(low, begin - block)), min(end, max(high, begin + block))), None
