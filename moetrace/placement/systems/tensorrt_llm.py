"""TensorRT-LLM: changes one layer in each iteration by itself, or reads an assignment as YAML."""

from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy, plan_from_scratch
from moetrace.placement.systems.base import Deployment, File, System


def _launch(_policy: Policy, planning: Planning, experts: int) -> str:
    return (
        f"moe_config: {{backend: WIDEEP, load_balancer: {{num_slots: {experts + planning.redundant}, "
        f"layer_updates_per_iter: 1}}}}, enable_attention_dp: true, moe_expert_parallel_size: {planning.gpus}"
    )


def load_balancer(plan: Deployment) -> bytes:
    """The ``moe_config.load_balancer`` as YAML: an assignment that stays as it is.

    Layers that are missing between the first and the last of the model get the default placement: it stops
    where it finds none.
    """
    rows = plan.every_row(min(plan.slots)) if plan.model_layers else plan.flat
    lines = [f"num_slots: {plan.number_of_slots}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    return ("\n".join([*lines, *(f"  {layer}: {row}" for layer, row in sorted(rows.items()))]) + "\n").encode()


def _flags(plan: Deployment, path: str) -> str:
    return (
        f"moe_config: {{backend: WIDEEP, load_balancer: {path}}}, enable_attention_dp: true, "
        f"moe_expert_parallel_size: {plan.gpus}"
    )


TENSORRT_LLM = System(
    "TensorRT-LLM",
    # A layer an iteration, then one without; older loads decay by 0.9 a step, as scattered as a mean of 19 steps.
    policies=lambda layers: [Policy("TensorRT-LLM", min(layers + 1, 19), layers + 1, plan_from_scratch, even=True)],
    launch=_launch,
    files=(File("TensorRT-LLM", ".tensorrt-llm.yaml", load_balancer, _flags),),
    read=lambda document, _: {int(layer): row for layer, row in document["initial_global_assignments"].items()},
)
