"""Dispatch: how the tokens of an expert are split among its replicas, and what load each GPU then has.

Everywhere tokens come evenly from all GPUs, each of which has its own: a trace does not say where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError
from moetrace.placement.planner import Ints
from moetrace.placement.step_time import BY_TOKENS, StepTime
from moetrace.trace import Shares

Held = NDArray[Any]
"""How many slots of each GPU hold each expert, or whether one does, shape (gpus, experts)."""
Tokens = NDArray[Any]

EVEN, NEAREST, LP, FEWEST = DISPATCHES = ("even", "nearest", "lp", "fewest")
SEED = 42  # of SGLang's choices
# The split of a linear programme is refined until no load changes by more than this part of the mean one.
EXACT = 1e-5
MOST_ROUNDS = 500
# GPUs whose sets are all tried for the busiest one alone.
MOST_TRIED = 8


@dataclass(frozen=True)
class Dispatch:
    """How tokens are split among replicas, on so many *nodes*, and how long an expert takes for them (*time*).

    ``even``: each replica gets the same. ``nearest``: the replica on the same GPU takes the tokens of that GPU, else
    the first one on the same node, else one that was chosen once (SGLang 0.5.23, ``static``). ``lp``: in every step
    so that the busiest GPU has fewest tokens, by a linear programme (DeepSeek's LPLB, SGLang's ``lp``). ``fewest``: in
    every step to as few replicas as leave the busiest GPU no longer at work (the aim of METRO, arXiv 2512.09277).
    Loads are in the unit of `StepTime.cost`: tokens, where time is in proportion to them.
    Raises `SettingError` for another one.
    """

    kind: str = EVEN
    nodes: int = 1
    time: StepTime = BY_TOKENS

    def __post_init__(self) -> None:
        if self.kind not in DISPATCHES:
            raise SettingError(f"tokens are split {', '.join(DISPATCHES[:-1])} or {DISPATCHES[-1]}, not {self.kind!r}")

    @property
    def by_tokens(self) -> Dispatch:
        """The same where time is in proportion to tokens."""
        return Dispatch(self.kind, self.nodes)

    def expected_parts(self, held: Held) -> Shares:
        """The part of each expert's tokens that each GPU works on, as far as a plan can know it, shape of *held*.

        A choice that is made once falls on all replicas alike. Where the tokens of each step are split anew, plans are
        searched by an even split.
        """
        if self.kind == NEAREST and self.nodes > 1:
            return _nearest_parts(held > 0, self.nodes)
        return held / held.sum(axis=0)

    def loads(self, held: Held, counts: Tokens) -> Shares:
        """The load of each GPU in steps of *counts* (steps, experts), shape (steps, gpus)."""
        if self.kind == FEWEST:
            return fewest_loads(held, counts, self.time)
        if self.kind == LP:
            return least_loads(held, counts, self.time)
        if self.kind == EVEN and not self.time.linear:  # all replicas of an expert take as long
            return self.time.cost(counts / held.sum(axis=0)) @ held.T
        parts = _chosen_parts(held, self.nodes) if self.kind == NEAREST else self.expected_parts(held)
        if self.time.linear:
            return counts @ parts.T
        return np.stack([self.time.cost(counts * own).sum(axis=1) for own in parts], axis=1)

    def peaks(self, held: Held, counts: Tokens) -> Shares:
        """The load of the busiest GPU in steps of *counts* (steps, experts), shape (steps,)."""
        if self.kind == LP and self.time.linear:
            return least_peaks(held, counts)
        return self.loads(held, counts).max(axis=1)

    def alone(self, copies: Ints, tokens: Tokens) -> Shares:
        """What *copies* (experts,) replicas of each expert take together for *tokens* (steps, experts), same shape."""
        if self.kind == FEWEST:
            return self.time.cost(tokens)
        return self.time.cost(tokens / copies) * copies


EVENLY = Dispatch()


def _nearest_parts(held: NDArray[np.bool_], nodes: int) -> Shares:
    """The parts that each GPU works on if what is chosen once falls on all replicas alike, shape of *held*."""
    gpus, experts = held.shape
    by_node = held.reshape(nodes, gpus // nodes, experts)
    copies, there = held.sum(axis=0), by_node.sum(axis=1)  # (experts,), (nodes, experts)
    some, others = (there > 0) & (there < copies), gpus // nodes - there
    first = by_node & (by_node.cumsum(axis=1) == 1)
    near = by_node + first * (some * others)[:, None]
    far = np.where(some, 0, others).sum(axis=0) / copies
    return (near.reshape(held.shape) + held * far) / gpus


def _chosen_parts(held: Held, nodes: int) -> Shares:
    """The parts that each GPU works on after the choices of SGLang, shape of *held*."""
    gpus, experts = held.shape
    slots = np.array([np.repeat(np.arange(experts), row) for row in held])
    table = nearest_table(slots.reshape(1, -1), gpus, nodes)[:, 0]
    parts = np.zeros((gpus, experts))
    np.add.at(parts, (table // slots.shape[1], np.arange(experts)), 1 / gpus)
    return parts


def nearest_table(phy2log: Ints, gpus: int, nodes: int = 1, seed: int = SEED) -> Ints:
    """The slot to which each GPU sends its tokens of each expert, shape (gpus, layers, experts).

    *phy2log* (layers, slots) is the expert in each slot, GPU after GPU. An expert of the same GPU comes first, then
    the first one on the same node, unless all are there, then a fair choice that is made once, layer after layer, as
    SGLang 0.5.23 does with ``--ep-dispatch-algorithm static`` for a plan from a file: each rank draws for itself, so
    that choices are fair only on average.

    >>> nearest_table(np.array([[0, 1, 0, 2]]), gpus=2).tolist()
    [[[0, 1, 3]], [[2, 1, 3]]]
    """
    layers, experts, size = len(phy2log), int(phy2log.max()) + 1, phy2log.shape[1] // gpus
    table = np.empty((gpus, layers, experts), np.int64)
    draws = [Random(seed) for _ in range(gpus)]
    for layer, row in enumerate(phy2log):
        table[:, layer, row] = np.arange(len(row))  # the slot of each expert that has but one
        for expert in np.flatnonzero(np.bincount(row) > 1):
            slots = np.flatnonzero(row == expert).tolist()
            near = [_nearest(slots, gpu, size, gpus // nodes) for gpu in range(gpus)]
            far = [gpu for gpu, slot in enumerate(near) if slot < 0]
            times, rest = divmod(len(far), len(slots))
            for at, gpu in enumerate(far):  # each slot as often as any other but for the rest, in an order drawn
                choices = slots * times + draws[gpu].sample(slots, k=rest)
                draws[gpu].shuffle(choices)
                near[gpu] = choices[at]
            table[:, layer, expert] = near
    return table


def _nearest(slots: list[int], gpu: int, size: int, node: int) -> int:
    """The one of *slots* nearest to *gpu*, -1 if none is; GPUs have so many slots as *size*, nodes so many GPUs."""
    here = [slot for slot in slots if slot // size == gpu]
    there = [slot for slot in slots if slot // (size * node) == gpu // node]
    if here or len(slots) == 1:
        return (here or slots)[0]
    return there[0] if 0 < len(there) < len(slots) else -1


def least_peaks(held: Held, counts: Tokens) -> Shares:
    """The load of the busiest GPU in each step of `least_loads`, shape (steps,).

    No split leaves a set of GPUs less than the experts that are on them alone bring, and one leaves the busiest no more
    than the mean of the set where that is most (max-flow min-cut): of few GPUs, all sets are tried.
    """
    gpus = len(held)
    if gpus > MOST_TRIED:
        return least_loads(held, counts).max(axis=1)
    homes, expert = np.unique((held > 0).T @ (1 << np.arange(gpus)), return_inverse=True)  # sets of GPUs as bits
    inside = np.zeros((1 << gpus, len(counts)))
    inside[homes] = np.eye(len(homes))[:, expert] @ counts.T
    for gpu in range(gpus):  # what is inside a set without it is also inside the set with it
        pairs = inside.reshape(-1, 2, 1 << gpu, len(counts))
        pairs[:, 1] += pairs[:, 0]
    sizes = (np.arange(1, 1 << gpus)[:, None] >> np.arange(gpus) & 1).sum(axis=1)
    inside[1:] /= sizes[:, None]
    return inside.max(axis=0)


def least_loads(held: Held, counts: Tokens, time: StepTime = BY_TOKENS) -> Shares:
    """The load of each GPU if the tokens of each step are split so that the busiest has fewest, then the next.

    *held* (gpus, experts), *counts* (steps, experts); shape (steps, gpus). What a linear programme finds in each
    step; here one expert after the other fills the GPUs that hold it up to one level, all steps at once, until nothing
    changes: the sum of squared loads falls each time, and where it is least so is the busiest.
    """
    on, gpus, copies = held > 0, len(held), (held > 0).sum(axis=0)
    single = (on & (copies == 1)).astype(float)
    loads: Shares = single @ counts.T  # (gpus, steps)
    hosts = [(np.flatnonzero(on[:, expert]), counts[:, expert] / 1.0) for expert in np.flatnonzero(copies > 1)]
    given = [np.repeat(tokens[None] / len(own), len(own), axis=0) for own, tokens in hosts]
    for (own, _), mine in zip(hosts, given):
        loads[own] += mine
    close = EXACT * counts.sum(axis=1).max() / gpus
    for _ in range(MOST_ROUNDS):
        before = loads.copy()
        for (own, tokens), mine in zip(hosts, given):
            if len(own) == 2:  # as most are
                _level(loads[own[0]], loads[own[1]], mine[0], tokens)
                mine[1] = tokens - mine[0]
            else:
                others = loads[own] - mine
                mine[:] = _filled_up(others, tokens)
                loads[own] = others + mine
        if np.abs(loads - before).max() <= close:
            break
    if not time.linear:
        loads = single @ time.cost(counts).T
        for (own, _), mine in zip(hosts, given):
            loads[own] += time.cost(mine)
    return np.ascontiguousarray(loads.T)


def _level(one: Shares, other: Shares, given: Shares, tokens: Shares) -> None:
    """Makes the loads (steps,) of two GPUs as even as an expert on both can, of whose *tokens* the one was *given*."""
    both, without = one + other, one - given
    np.minimum(np.maximum(both / 2, without), without + tokens, out=one)
    np.subtract(one, without, out=given)
    np.subtract(both, one, out=other)


def _filled_up(loads: Shares, tokens: Shares) -> Shares:
    """How many of *tokens* (steps,) each GPU gets on top of *loads* (gpus, steps), the emptiest up to one level.

    The level is the lowest to which any number of the emptiest would come with all tokens.
    """
    many = np.arange(1, len(loads) + 1)[:, None]
    level = ((np.sort(loads, axis=0).cumsum(axis=0) + tokens) / many).min(axis=0)
    return np.maximum(level - loads, 0)


def fewest_loads(held: Held, counts: Tokens, time: StepTime) -> Shares:
    """The load of each GPU if every step wakes as few replicas as leave its busiest GPU no longer at work.

    *held* (gpus, experts), *counts* (steps, experts); shape (steps, gpus). Experts with one replica first, then the
    others from the longest to the shortest on average: of the GPUs that hold it an expert takes the emptiest, as many
    as leave the busiest of them least (the fewest of equal numbers).
    """
    copies = (held > 0).sum(axis=0)
    loads: Shares = time.cost(counts) @ ((held > 0) & (copies == 1)).T
    rows = np.arange(len(counts))[:, None]
    shared = np.flatnonzero(copies > 1)
    for expert in shared[np.argsort(-counts[:, shared].sum(axis=0), kind="stable")]:
        own = np.flatnonzero(held[:, expert])
        order = own[np.argsort(loads[:, own], axis=1, kind="stable")]  # (steps, replicas), the emptiest first
        tokens, many = counts[:, [expert]], np.arange(1, len(own) + 1)
        each = time.cost(tokens / many)  # of one of so many; a token is on one
        each[many > np.maximum(tokens / time.passes, 1)] = np.inf
        ends = (loads[rows, order] + each).astype(np.float32)
        number = np.maximum(ends, loads.max(axis=1, keepdims=True).astype(np.float32)).argmin(axis=1)
        loads[rows, order] += np.where(np.arange(len(own)) <= number[:, None], each[rows, number[:, None]], 0.0)
    return loads
