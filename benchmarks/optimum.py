"""What plans are measured against: the best plan there is, by SciPy's MILP, and the planner that DeepSeek published."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lowest_peak(shares: NDArray[np.float64], gpus: int, redundant: int, seconds: float = 60.0) -> tuple[float, float]:
    """Peak over mean of the best plan found in so many *seconds*, and a bound that no plan is below.

    An expert with c replicas is on c GPUs, each with 1 / c of its load; every GPU has the same number of slots.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    experts, most = len(shares), min(gpus, redundant + 1)
    on = np.arange(experts * most * gpus).reshape(experts, most, gpus)  # expert with c replicas has one on the GPU
    has = on.size + np.arange(experts * most).reshape(experts, most)  # expert has c replicas
    peak = on.size + has.size
    copies = np.arange(1, most + 1)
    rows = [(dict.fromkeys(has[e], 1.0), 1, 1) for e in range(experts)]
    rows += [
        ({**dict.fromkeys(on[e, c], 1.0), has[e, c]: -float(copies[c])}, 0, 0)
        for e in range(experts)
        for c in range(most)
    ]
    rows += [(dict.fromkeys(on[e, :, g], 1.0), 0, 1) for e in range(experts) for g in range(gpus)]
    for g in range(gpus):
        rows.append((dict.fromkeys(on[:, :, g].ravel(), 1.0), *[(experts + redundant) // gpus] * 2))
        load = {on[e, c, g]: shares[e] / copies[c] for e in range(experts) for c in range(most)}
        rows.append(({**load, peak: -1.0}, -np.inf, 0))
    matrix = csr_array(
        (
            [value for row, _, _ in rows for value in row.values()],
            [i for row, _, _ in rows for i in row],
            np.cumsum([0, *(len(row) for row, _, _ in rows)]),
        ),
        shape=(len(rows), peak + 1),
    )
    whole, cost = np.ones(peak + 1), np.zeros(peak + 1)
    whole[peak], cost[peak] = 0, 1
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=whole,
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 1e-4},
    )
    return found.fun * gpus / shares.sum(), found.mip_dual_bound * gpus / shares.sum()


def published(load: NDArray[np.float64], replicas: int, groups: int, nodes: int, gpus: int) -> float:
    """Peak over mean of DeepSeek's EPLB for one layer, after its description (2025), in plain loops."""
    size = len(load) // groups
    homes = _greedy([load[i * size : (i + 1) * size].sum() for i in range(groups)], nodes)
    peaks = []
    for home in homes:
        own = [load[i * size + j] for i in home for j in range(size)]
        copies = [1] * len(own)
        for _ in range(replicas // nodes - len(own)):
            copies[max(range(len(own)), key=lambda e: own[e] / copies[e])] += 1
        parts = [weight / n for weight, n in zip(own, copies) for _ in range(n)]
        peaks += [sum(parts[i] for i in gpu) for gpu in _greedy(parts, gpus // nodes)]
    return max(peaks) * gpus / load.sum()


def _greedy(weights: list[float], packs: int) -> list[list[int]]:
    """The heaviest first to the pack with least weight that has room."""
    found: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        room = [pack for pack in found if len(pack) < len(weights) // packs]
        min(room, key=lambda pack: sum(weights[i] for i in pack)).append(item)
    return found
