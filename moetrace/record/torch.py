"""Counting in torch: hooks on modules that choose experts, or keep counts of the chosen.

What counts is decided for every pass alike. Evaluation (`model.eval()`, `torch.no_grad()`) does not
count unless asked for. Recomputation of activations does not count twice: a pass that runs inside the
backward pass is left out where the same layer was counted going forward. Where it was not, because
reentrant checkpointing runs the first pass without gradients, the recomputed pass is the one that counts.
Passes of one step are added up, so gradient accumulation needs nothing.

The buffers of Megatron-Core (`local_tokens_per_expert` and `global_tokens_per_expert` of `TopKRouter`)
and torchtitan (`tokens_per_expert` of `MoE`) are read by how much one forward pass adds to them, so it
does not matter when the framework sets them back. Both are written against the frameworks' sources and
tested on modules made alike; the frameworks themselves need GPUs and were not run. Compiled modules
(`torch.compile`) were not tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from moetrace.errors import TraceError
from moetrace.record.arguments import LAYERS, integer
from moetrace.record.distributed import rank, sum_over_ranks
from moetrace.record.recorder import Recorder
from moetrace.trace import FLOAT32_EXACT

Tensor = Any
Module = Any
Pick = Callable[[Module, tuple[Any, ...], dict[str, Any], Any], Tensor]
"""Takes what a forward pass had: the module, its arguments, its keyword arguments, its output."""

# Counts of one forward pass, summed over the local tokens unless the name says global. The names
# are those of Megatron-Core, torchtitan (two versions) and OLMo-core.
BUFFERS = (
    "local_tokens_per_expert",
    "tokens_per_expert",
    "tokens_per_expert_E",
    "batch_size_per_expert",
    "global_tokens_per_expert",
)


class Watch:
    """Counts on the device what watched modules route, and hands it to *recorder* once a step.

    Counts are summed over the ranks of *group* where `torch.distributed` is initialised; the ranks
    without a recorder (None) only take part in the sum. *evaluation* counts evaluation passes too.
    """

    def __init__(self, recorder: Recorder | None, *, evaluation: bool = False, group: Any = None) -> None:
        self.recorder = recorder
        self._evaluation = evaluation
        self._group = group
        self._counts: dict[int, Tensor] = {}
        self._forward: set[int] = set()  # layers counted outside the backward pass in this step
        self._largest: list[Tensor] = []
        self._handles: list[Any] = []

    # --- what to watch ------------------------------------------------------------------------

    def indices(self, module: Module, layer: int, experts: int, pick: Pick, weights: Pick | None = None) -> None:
        """Count the expert indices that *pick* takes from each pass, any shape, of *experts* experts.

        *weights*, of the same shape, holds 1 for choices that count and 0 for those that do not.
        """

        def counts(*passed: Any) -> Tensor:
            chosen = pick(*passed)
            return count_indices(chosen, experts, None if weights is None else weights(*passed))

        self._hook(module, layer, counts)

    def chosen(self, module: Module, layer: int, pick: Pick) -> None:
        """Count the map of choices (tokens, experts) that *pick* takes from each pass, true where chosen."""
        self._hook(module, layer, lambda *passed: (pick(*passed) != 0).sum(0))

    def counts(self, module: Module, layer: int, pick: Pick) -> None:
        """Add up the counts (experts,) that *pick* takes from each pass."""
        self._hook(module, layer, pick)

    def buffer(self, module: Module, layer: int, name: str, *, summed: bool = False) -> None:
        """Count what each pass adds to the buffer *name* (experts,) of *module*.

        *summed* says that the framework has summed it over the ranks already. A float32 buffer that is
        never set back stops counting exactly at 2**24: `step` raises `TraceError` from there on.
        """
        layer = integer(layer, "layer", *LAYERS, type(module).__name__)
        before: list[Tensor] = []

        def keep(_module: Module, _args: Any) -> None:
            before[:] = [getattr(module, name).detach().clone()]

        def counts(*_passed: Any) -> Tensor:
            after = getattr(module, name).detach()
            if after.dtype == torch.float32:
                self._largest.append(after.max())
            added = after - before[0]
            return torch.zeros_like(added) if summed and rank(self._group) else added

        self._handles.append(module.register_forward_pre_hook(keep))
        self._hook(module, layer, counts)

    # --- counting -----------------------------------------------------------------------------

    def wants(self, module: Module, layer: int) -> bool:
        """Whether the pass that *module* is in the middle of counts for *layer*."""
        backward = torch._C._current_graph_task_id() != -1
        if self._evaluation:
            return not backward
        if not (module.training and torch.is_grad_enabled()):
            return False
        if not backward:
            self._forward.add(layer)
        return not backward or layer not in self._forward

    def add(self, layer: int, counts: Tensor) -> None:
        """Add *counts* (experts,), a tensor on any device, to the step that is under way."""
        fresh = counts.detach().to(torch.int64)
        held = self._counts.get(layer)
        self._counts[layer] = fresh.clone() if held is None else held + fresh

    def step(self, step: int | None = None) -> None:
        """End the step: sum over ranks, move to the host once, and record it under that number.

        Raises `TraceError` when nothing was counted, or not exactly.
        """
        if not self._counts:
            raise TraceError(
                "the watched modules",
                "no pass was counted in this step",
                "call model.train(), or give evaluation=True to count passes without training",
            )
        self._check_exact()
        layers = sorted(self._counts)
        sizes = [len(self._counts[layer]) for layer in layers]
        together = sum_over_ranks(torch.cat([self._counts[layer] for layer in layers]), self._group)
        self._counts, self._forward = {}, set()
        if self.recorder is not None:
            for layer, counts in zip(layers, together.cpu().split(sizes)):
                self.recorder.add(layer, counts.numpy())
            self.recorder.step(step)

    def owns(self, handle: Any) -> None:
        """Take the hook of *handle* off together with the others."""
        self._handles.append(handle)

    def close(self) -> None:
        """Take the hooks off again; the recorder stays open."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, module: Module, layer: int, counts: Pick) -> None:
        layer = integer(layer, "layer", *LAYERS, type(module).__name__)

        def count(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.wants(module, layer):
                with torch.no_grad():
                    self.add(layer, counts(module, args, kwargs, output))

        self._handles.append(module.register_forward_hook(count, with_kwargs=True))

    def _check_exact(self) -> None:
        largest, self._largest = self._largest, []
        if largest and float(torch.stack(largest).max()) >= FLOAT32_EXACT:
            raise TraceError(
                "a watched buffer",
                f"has reached {FLOAT32_EXACT:,}, from where float32 does not count exactly",
                "set it back to zero after every step",
            )


def count_indices(indices: Tensor, experts: int, weights: Tensor | None = None) -> Tensor:
    """How often each of *experts* is in *indices*, on their device, shape (experts,).

    *weights*, of the shape of *indices*, counts a choice 0 or 1 times.
    """
    flat = indices.reshape(-1).to(torch.int64)
    ones = torch.ones_like(flat) if weights is None else weights.reshape(-1).to(torch.int64)
    # bincount would have to ask the device for the largest index, and wait for the answer.
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, ones)


def watch_buffers(model: Module, recorder: Recorder | None, **settings: Any) -> Watch:
    """Watch every module of *model* that keeps counts in a buffer of a known name (`BUFFERS`).

    The layer is the module's `layer_number` where it has one, as in Megatron-Core, otherwise the last
    number in its name. *settings* are those of `Watch`. Raises `TraceError` when there is none.
    """
    watch = Watch(recorder, **settings)
    found = {path: (module, name) for path, module in model.named_modules() if (name := _buffer_of(module))}
    layers = layers_of({path: module for path, (module, _) in found.items()})
    for path, (module, name) in found.items():
        watch.buffer(module, layers[path], name, summed=name.startswith("global"))
    if not found:
        raise TraceError(
            type(model).__name__,
            f"has no buffer named {', '.join(BUFFERS)}",
            "watch the routers by hand with Watch.indices, Watch.chosen or Watch.counts",
        )
    return watch


def _buffer_of(module: Module) -> str | None:
    return next((name for name in BUFFERS if isinstance(getattr(module, name, None), torch.Tensor)), None)


def layers_of(modules: dict[str, Module]) -> dict[str, int]:
    """The layer of each of *modules*, by their names in the model.

    Raises `TraceError` when two are the same layer: their counts would be added up.
    """
    layers = {path: _layer_of(module, path) for path, module in modules.items()}
    by_layer: dict[int, str] = {}
    for path, layer in layers.items():
        if layer in by_layer:
            raise TraceError(
                path, f"is layer {layer}, as is {by_layer[layer]}", "watch one part of the model, or each by hand"
            )
        by_layer[layer] = path
    return layers


def _layer_of(module: Module, path: str) -> int:
    """The layer of *module*, from its `layer_number` or the last number in its *path*.

    Raises `TraceError` when neither says it.
    """
    number = getattr(module, "layer_number", None)
    if number is not None:
        return int(number)
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    if not numbers:
        raise TraceError(path or type(module).__name__, "has no layer number in its name", "watch it by hand")
    return int(numbers[-1])
