"""One of two gloo processes that train a tiny model of a framework's own MoE layers, recorded in each way there is.

python training.py FRAMEWORK FOLDER RANK

Every step has two micro-batches and an evaluation between them; activations are kept, or recomputed in either way.
Prints as JSON what the routers chose of this rank's tokens, (steps, layers, experts), by the same model run plainly.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moetrace.record.distributed import shared_recorder
from moetrace.record.torch import Watch, watch_buffers

EXPERTS, TOP_K, WIDTH, NUMBERS = 8, 2, 16, (3, 7)
WAYS = (None, "plain", "reentrant", "plain", None)


class MegatronLayer(torch.nn.Module):
    """Megatron-Core's router, by which tokens are scaled."""

    def __init__(self, number, bias):
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=max(NUMBERS),
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOP_K,
            moe_ffn_hidden_size=WIDTH,
            moe_router_enable_expert_bias=bias,
            moe_router_score_function="sigmoid" if bias else "softmax",
            moe_router_load_balancing_type="none" if bias else "aux_loss",
            moe_aux_loss_coeff=0.0 if bias else 0.01,
        )
        self.router = TopKRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
        self.router.set_layer_number(number)

    def forward(self, x):
        """Tokens (length, batch, width)."""
        scores, _ = self.router(x)
        return x * scores.sum(-1).view(*x.shape[:2], 1)


def titan_layer():
    """torchtitan's MoE with its router, experts and dispatcher."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    layer = MoE.Config(
        num_experts=EXPERTS,
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, top_k=TOP_K, gate=Linear.Config(in_features=WIDTH, out_features=EXPERTS)
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=WIDTH, hidden_dim=WIDTH, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
        ),
    ).build()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer


class Model(torch.nn.Module):
    """Two layers of the framework, the same each time; what they choose is kept in *chosen* where they are not recomputed."""

    def __init__(self, framework):
        super().__init__()
        torch.manual_seed(0)
        self.chosen = []
        if framework == "torchtitan":
            self.layers = torch.nn.ModuleDict({str(number): titan_layer() for number in NUMBERS})
        else:
            bias = framework == "megatron-bias"
            self.layers = torch.nn.ModuleDict({str(number): MegatronLayer(number, bias) for number in NUMBERS})

    def keep(self):
        """Keep from now on what each router chooses, as counts of experts."""
        for layer in self.layers.values():

            def count(_module, _args, output):
                chosen = output[1]
                flat = chosen.nonzero()[:, 1] if chosen.dtype == torch.bool else chosen.flatten()
                self.chosen.append(torch.bincount(flat, minlength=EXPERTS))

            layer.router.register_forward_hook(count)
        return self

    def forward(self, x, way=None):
        """Tokens (length, batch, width)."""
        for layer in self.layers.values():
            x = layer(x) if way is None else checkpoint(layer, x, use_reentrant=way == "reentrant")
        return x


def tokens(seed):
    """Twenty tokens of their own."""
    return torch.randn(10, 2, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def main(framework, folder, rank):
    """Train, record, and print what was routed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if framework.startswith("megatron"):
        torch.cuda.current_device = lambda: "cpu"
        from megatron.core import parallel_state
        from megatron.core.transformer.moe import moe_utils

        moe_utils.te_general_gemm = None
        parallel_state.initialize_model_parallel()
    model, plain, expected = Model(framework), Model(framework).keep(), []
    with ExitStack() as stack:
        chosen = stack.enter_context(shared_recorder(folder / "chosen.parquet"))
        by_hand = Watch(chosen)
        for number, layer in model.layers.items():
            if framework == "torchtitan":
                by_hand.indices(layer.router, int(number), EXPERTS, lambda _m, _a, _k, output: output[1])
            else:
                by_hand.chosen(layer.router, int(number), lambda _m, _a, _k, output: output[1])
        by_hand.within(model, [f"layers.{number}.router" for number in model.layers])
        watching = [by_hand]
        if framework != "megatron":  # it keeps its buffer with the bias alone
            buffers = stack.enter_context(shared_recorder(folder / "buffers.parquet"))
            watching.append(watch_buffers(model, buffers))
        for step, way in enumerate(WAYS):
            plain.chosen.clear()
            for micro in range(2):
                x = tokens(100 * rank + 10 * step + micro)
                model(x, way).sum().backward()
                plain(x)
                model.eval()
                with torch.no_grad():
                    model(tokens(99))
                model.train()
            expected.append((torch.stack(plain.chosen[:2]) + torch.stack(plain.chosen[2:])).tolist())
            for watch in watching:
                watch.step()
    sys.stdout.write(json.dumps(expected) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
