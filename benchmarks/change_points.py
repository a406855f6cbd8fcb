"""How well change points are located: jumps of the level and beginnings of drift, logged every step to every 100th.

Synthetic layers whose change is known: a jump from one constant load to another, or a constant load that begins to
drift. Prints Markdown; `make bench` runs it, and the tests take its layers.
"""

from __future__ import annotations

import numpy as np

from moetrace.analysis.states import LayerStates, classify
from moetrace.trace import LayerLoad
from moetrace.words import STABLE

STRIDES = (1, 10, 20, 100)
SIZES = (0.2, 0.5, 1.0)


def _logged(shares: np.ndarray, tokens: int, stride: int, rng: np.random.Generator) -> LayerLoad:
    """The layer with these *shares* (steps, experts), every *stride*-th step logged."""
    steps = np.arange(1, len(shares) + 1)[stride - 1 :: stride]
    return LayerLoad("synthetic", 0, steps, rng.multinomial(tokens, shares[stride - 1 :: stride]))


def jump(seed: int, stride: int, size: float, after: int = 3000, steps: int = 6000) -> LayerLoad:
    """A constant load up to the step *after*, then another: each share times exp of a normal change of that *size*."""
    rng = np.random.default_rng([seed, 9])
    experts, tokens = int(rng.choice([8, 16, 64])), int(np.exp(rng.uniform(*np.log([3000, 100_000]))))
    old = rng.dirichlet(np.full(experts, 3.0))
    new = old * np.exp(rng.normal(0, size, experts))
    shares = np.where((np.arange(1, steps + 1) > after)[:, None], new / new.sum(), old)
    return _logged(shares, tokens, stride, rng)


def drift(seed: int, stride: int, steps: int = 6000) -> tuple[int, LayerLoad]:
    """The step at which a constant load begins to drift, by a line or a random walk in turn, and the layer."""
    rng = np.random.default_rng([seed, 5])
    experts, tokens = int(rng.choice([8, 16, 64])), int(np.exp(rng.uniform(*np.log([3000, 100_000]))))
    begin, at = int(rng.integers(2000, 4500)), np.arange(1, steps + 1)
    old = rng.dirichlet(np.full(experts, 3.0))
    if seed % 2:
        new = rng.dirichlet(np.full(experts, 3.0))
        apart = np.sqrt((np.square(new - old) / ((old + new) / 2)).sum())
        rate = np.exp(rng.uniform(*np.log([0.08, 0.4]))) / 200 / apart  # so much movement in a window of 200 steps
        part = np.clip((at - begin) * rate, 0, 1)[:, None]
        shares = (1 - part) * old + part * new
    else:
        volatility = np.where(at < begin, 0.0, np.exp(rng.uniform(*np.log([0.007, 0.03]))))
        heights = old * np.exp(np.cumsum(rng.normal(0, 1, (steps, experts)) * volatility[:, None], axis=0))
        shares = heights / heights.sum(axis=1, keepdims=True)
    return begin, _logged(shares, tokens, stride, rng)


def located(seeds: range, stride: int, size: float) -> list[tuple[int, bool]]:
    """For each jump that unsettled its layer how late the settle step is, and whether its interval holds the truth."""
    scale = 10 if stride > 20 else 1
    after, found = 3000 * scale, list[tuple[int, bool]]()
    for seed in seeds:
        states = classify(jump(seed, stride, size, after, 6000 * scale))
        if len(states.runs) > 1 and states.settle_step is not None and states.settle_interval is not None:
            low, high = states.settle_interval
            found.append((states.settle_step - after - 1, low <= after + 1 <= high))
    return found


def unsettled(seeds: range, stride: int) -> list[tuple[int, bool]]:
    """For each drift seen at the end how early or late its begin is, and whether the interval holds the truth."""
    found = list[tuple[int, bool]]()
    for seed in seeds:
        begin, load = drift(seed, stride)
        states = classify(load)
        if states.unsettled_step is not None and states.unsettled_interval is not None:
            low, high = states.unsettled_interval
            found.append((states.unsettled_step - begin, low <= begin <= high))
    return found


def noticed(seeds: range) -> list[int]:
    """How many steps after it began a drift is noticed in a trace that is still growing, looked at every 50 steps."""
    late = []
    for seed in seeds:
        begin, load = drift(seed, 1)
        known = ((step - begin, _at(load, step)) for step in range(begin, int(load.steps[-1]), 50))
        late += [step for step, states in known if states.state != STABLE][:1]
    return late


def _at(load: LayerLoad, step: int) -> LayerStates:
    return classify(load.until(step))


def main() -> None:
    """Print the tables."""
    print("| jump of the level, logged every | size | located | late, median / largest | interval holds it |")
    print("|---:|---:|---:|---:|---:|")
    for stride in STRIDES:
        for size in SIZES:
            found = located(range(1000, 1040), stride, size)
            late = np.abs([steps for steps, _ in found])
            held = np.mean([held for _, held in found])
            print(f"| {stride} | {size} | {len(found)} of 40 | {np.median(late):.0f} / {late.max()} | {held:.0%} |")
    print("\n| beginning of a drift, logged every | seen | early or late, median / 90% | interval holds it |")
    print("|---:|---:|---:|---:|")
    for stride in (1, 10):
        found = unsettled(range(1000, 1400), stride)
        apart = np.abs([steps for steps, _ in found])
        held = np.mean([held for _, held in found])
        print(
            f"| {stride} | {len(found)} of 400 | {np.median(apart):.0f} / {np.quantile(apart, 0.9):.0f} | {held:.0%} |"
        )
    late = noticed(range(1000, 1060))
    print("\n| growing trace | steps until a drift is noticed, median / 90% |\n|---|---:|")
    print(f"| every 50 steps | {np.median(late):.0f} / {np.quantile(late, 0.9):.0f} |")


if __name__ == "__main__":
    main()
