"""DeepSeek's EPLB: the array of loads that its `rebalance_experts` takes."""

import io

import numpy as np

from moetrace.placement.systems.base import TOKENS, Deployment, File, System


def weight(plan: Deployment) -> bytes:
    """The ``weight`` of EPLB: the predicted load, (layers, experts), MoE layers in order, as ``.npy``."""
    file = io.BytesIO()
    np.save(file, np.array([plan.loads[layer] for layer in sorted(plan.loads)]) * TOKENS)
    return file.getvalue()


def _flags(plan: Deployment, path: str) -> str:
    return (
        f'rebalance_experts(torch.from_numpy(numpy.load("{path}")), num_replicas={plan.number_of_slots}, '
        f"num_groups={plan.groups}, num_nodes={plan.nodes}, num_gpus={plan.gpus})"
    )


EPLB = System("DeepSeek's EPLB", files=(File("DeepSeek's EPLB", ".eplb-weight.npy", weight, _flags),))
