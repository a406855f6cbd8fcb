"""Synthetic traces that settle at a known step: the ground truth of the state rule, and test data.

Router logits wander, each step by a normal change of the course's present *volatility*, pulled
gently back so that no expert takes all. Counts are drawn from the softmax of the logits. A course
settles where its volatility falls for good. Nothing here is a recorded trace, and what is made here
says so in its metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError
from moetrace.trace import Counts, LoadTrace, Steps, TraceInfo

# Relative change of a share per step. A random walk of volatility s moves by s * sqrt(133) from one
# window of 200 steps to the next: 12 % and 1.2 %, well on either side of what counts as stable.
LOUD = 0.01
QUIET = 0.001
# Standard deviation of the logits that the pull keeps: shares of about 1 : 4 : 16 within a layer.
LOGIT_SPREAD = 0.7


@dataclass(frozen=True)
class Course:
    """How one layer of a synthetic trace goes.

    *changes* are pairs (step, volatility), the volatility from that step on; *width* is the number of
    steps over which each change happens, centred on its step and geometric. *tokens* are drawn in
    each step: multinomial, or Dirichlet-multinomial with *concentration*, as for sequences that share a
    topic (the smaller, the noisier). The last *collapsed* experts get almost nothing.
    """

    steps: int = 6000
    experts: int = 8
    tokens: int = 4096
    changes: tuple[tuple[int, float], ...] = ((1, LOUD), (3000, QUIET))
    width: int = 0
    concentration: float | None = None
    collapsed: int = 0

    @property
    def settle_step(self) -> int | None:
        """The first step of the last change if that is to quiet, None if the course ends loud."""
        step, volatility = self.changes[-1]
        return step if volatility <= (LOUD * QUIET) ** 0.5 else None

    def volatility(self) -> NDArray[np.float64]:
        """The volatility at each step, shape (steps,)."""
        at = np.arange(1, self.steps + 1)
        level = np.full(self.steps, np.log(self.changes[0][1]))
        for (_, old), (step, new) in zip(self.changes, self.changes[1:]):
            ramp = np.clip((at - step) / max(self.width, 1) + (0.5 if self.width else 1), 0, 1)
            level += ramp * (np.log(new) - np.log(old))
        volatility: NDArray[np.float64] = np.exp(level)
        return volatility


def settling(settle_step: int, **course: object) -> Course:
    """A course that is loud, and quiet from *settle_step* on.

    >>> import moetrace as mt
    >>> mt.settling(500, steps=2000).settle_step
    500
    """
    return replace(Course(changes=((1, LOUD), (settle_step, QUIET))), **course)  # type: ignore[arg-type]


def synthetic_trace(courses: Sequence[Course], *, name: str = "synthetic", seed: int = 0) -> LoadTrace:
    """A trace with one layer for each of *courses*, steps from 1, layers from 0.

    A layer is made when it is read, always the same for the same *seed*; nothing is kept.
    Raises `SettingError` when the courses differ in steps or experts.

    >>> import moetrace as mt
    >>> mt.synthetic_trace([mt.settling(500, steps=2000)]).counts.shape
    (2000, 1, 8)
    """
    steps, experts = _shape(courses)
    tokens = {course.tokens for course in courses}
    info = TraceInfo(
        name=name,
        model="synthetic",
        format="synthetic",
        tokens_per_step=tokens.pop() if len(tokens) == 1 else None,
        settings={"seed": seed},
    )

    def read_layer(number: int) -> Counts:
        return np.concatenate(list(layer_counts(courses[number], (seed, number), steps)))

    return LoadTrace(info, np.arange(1, steps + 1), tuple(range(len(courses))), experts, read_layer)


def synthetic_blocks(courses: Sequence[Course], *, seed: int = 0, block: int = 256) -> Iterator[tuple[Steps, Counts]]:
    """The same trace in the order of its steps: pieces of *block* steps, counts of shape (steps, layers, experts).

    For traces of any size: one piece is held at a time.
    Raises `SettingError` when the courses differ in steps or experts.
    """
    steps, _ = _shape(courses)
    layers = [layer_counts(course, (seed, number), block) for number, course in enumerate(courses)]
    for start, pieces in zip(range(0, steps, block), zip(*layers)):
        yield np.arange(start + 1, start + 1 + len(pieces[0])), np.stack(pieces, axis=1)


def _shape(courses: Sequence[Course]) -> tuple[int, int]:
    """The steps and experts that all *courses* share."""
    shapes = {(course.steps, course.experts) for course in courses}
    if len(shapes) != 1:
        raise SettingError(f"courses of one trace need the same steps and experts, not {sorted(shapes)}")
    return shapes.pop()


def layer_counts(course: Course, seed: tuple[int, int], block: int) -> Iterator[Counts]:
    """The counts of one layer in pieces of *block* steps, each (steps, experts).

    The same *seed* gives the same counts however long the pieces.
    """
    # Streams of their own: were topics and tokens drawn from one, the cut into blocks would show.
    walk, topic, draw = (np.random.default_rng([*seed, part]) for part in range(3))
    volatility = course.volatility()
    logits = walk.normal(0, LOGIT_SPREAD, course.experts)
    centre = logits.copy()
    for start in range(0, course.steps, block):
        rows = []
        for sigma in volatility[start : start + block]:
            pull = sigma**2 / (2 * LOGIT_SPREAD**2)
            logits = logits - pull * (logits - centre) + walk.normal(0, sigma, course.experts)
            rows.append(logits)
        yield _drawn(course, np.stack(rows), topic, draw)


def _drawn(
    course: Course, logits: NDArray[np.float64], topic: np.random.Generator, draw: np.random.Generator
) -> Counts:
    """Counts (steps, experts) for *logits* of the same shape."""
    heights = np.exp(logits)
    if course.collapsed:
        heights[:, -course.collapsed :] *= 1e-4
    shares = heights / heights.sum(axis=1, keepdims=True)
    if course.concentration is not None:
        gamma = topic.standard_gamma(shares * course.concentration) + 1e-12
        shares = gamma / gamma.sum(axis=1, keepdims=True)
    return draw.multinomial(course.tokens, shares)
