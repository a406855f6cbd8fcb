"""Counting in torch: hooks on modules that choose experts, or keep counts of the chosen.

The same rules hold for every pass. Evaluation (`model.eval()`, `torch.no_grad()`) does not
count unless asked for. Recomputation of activations does not count twice: a pass that runs inside the
backward pass is left out if the latest forward pass of the same layer was counted. Reentrant checkpointing
runs that pass without gradients: it counts nevertheless where the gradients of the whole pass are known to be on
(`Watch.within`), otherwise the recomputed pass counts. A pass that fails counts nothing, so it can be retried.
Passes of one step are added up, so gradient accumulation needs nothing.

The buffers of Megatron-Core (`local_tokens_per_expert` and `global_tokens_per_expert` of `TopKRouter`)
and torchtitan (`tokens_per_expert` of `MoE`) are read by how much one forward pass adds to them, so it
does not matter when the framework sets them back. Tested with `TopKRouter` of Megatron-Core 0.16 and `MoE` of
torchtitan 0.3 in two processes on a CPU (`make test-systems`); whole models, which need GPUs, were not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
"""Called with the module, the arguments, the keyword arguments and the output of a forward pass."""
Context = Callable[[Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Called with the module, its arguments and keyword arguments, and the context of the pass around this one."""

# Counts of one forward pass, summed over the local tokens unless the name says global. The names
# are those of Megatron-Core, torchtitan (two versions) and OLMo-core.
BUFFERS = (
    "local_tokens_per_expert", "tokens_per_expert", "tokens_per_expert_E", "batch_size_per_expert",
    "global_tokens_per_expert",
)  # fmt: skip


class Hook:
    """A hook of a watch; its copies, in a model that was deep-copied or saved whole, do nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *passed: Any) -> None:
        """Call what it was made of."""
        if self._call is not None:
            self._call(*passed)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Watch:
    """Counts on the device what watched modules route, and passes it to *recorder* once a step.

    Counts are summed over the ranks of *group* where `torch.distributed` is initialised; the ranks
    without a recorder (None) only take part in the sum. *evaluation* counts evaluation passes too.
    """

    def __init__(self, recorder: Recorder | None, *, evaluation: bool = False, group: Any = None) -> None:
        self.recorder = recorder
        self._evaluation = evaluation
        self._group = group
        self._counts: dict[int, Tensor] = {}
        self._pending: list[tuple[int, Tensor]] = []  # of the pass in progress, which may fail
        self._passes: list[tuple[Module, Any]] = []  # those in progress, the outermost first, with their context
        self._gradients = False  # whether they were on when the outermost began
        self._forward: set[int] = set()  # layers whose latest forward pass was counted
        self._largest: list[Tensor] = []
        self._handles: list[Any] = []

    # --- what to watch ------------------------------------------------------------------------

    def indices(self, module: Module, layer: int, experts: int, pick: Pick, weights: Pick | None = None) -> None:
        """Count the expert indices that *pick* takes from each pass, any shape, of *experts* experts.

        *weights*, of the same shape, holds 1 for choices that count and 0 for those that do not.
        """

        def counted(*passed: Any) -> torch.Tensor:
            return count_indices(pick(*passed), experts, None if weights is None else weights(*passed))

        self.counts(module, layer, counted)

    def chosen(self, module: Module, layer: int, pick: Pick) -> None:
        """Count the map of choices (tokens, experts) that *pick* takes from each pass, true where chosen."""
        self.counts(module, layer, lambda *passed: (pick(*passed) != 0).sum(0))

    def counts(self, module: Module, layer: int, pick: Pick, *, without_gradients: bool = True) -> None:
        """Add up the counts (experts,) that *pick* takes from each pass.

        *without_gradients* tells that *pick* gives them also in the first pass of reentrant checkpointing.
        """
        number = integer(layer, "layer", *LAYERS, type(module).__name__)

        def count(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.wants(module, number, without_gradients=without_gradients):
                with torch.no_grad():
                    self.add(number, pick(module, args, kwargs, output))

        self.register(module.register_forward_hook, count, with_kwargs=True)

    def buffer(self, module: Module, layer: int, name: str, *, summed: bool = False) -> None:
        """Count what each pass adds to the buffer *name* (experts,) of *module*.

        *summed* tells that the framework has summed it over the ranks already. A float32 buffer that is
        never reset stops counting exactly at 2**24: `step` raises `TraceError` from there on.
        """
        before: list[Tensor] = []

        def keep(_module: Module, _args: Any) -> None:
            before[:] = [getattr(module, name).detach().clone()]

        def added(*_passed: Any) -> Tensor:
            after = getattr(module, name).detach()
            if after.dtype == torch.float32:
                self._largest.append(after.max())
            difference = after - before[0]
            return torch.zeros_like(difference) if summed and rank(self._group) else difference

        self.register(module.register_forward_pre_hook, keep)
        # Megatron-Core leaves the buffer as it is where gradients are off.
        self.counts(module, layer, added, without_gradients=False)

    def within(self, model: Module, paths: Iterable[str], context: Context | None = None) -> None:
        """Count a pass of *model* as a whole: one that fails counts nothing, and can be retried.

        The same holds for a part of the model that is called by itself and holds a watched module; *paths* are the
        names of those. *context* makes what `context` gives while a pass is in progress.
        """
        parts = (path.split(".")[:end] for path in paths for end in range(path.count(".") + 1))
        names = {""} | {".".join(part) for part in parts if not any(name.isdigit() for name in part)}

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            known = [inside for inside, _ in self._passes]
            if module in known:  # it was interrupted before
                del self._passes[known.index(module) :]
            if not self._passes:
                self._pending, self._gradients = [], torch.is_grad_enabled()
            own = None if context is None else context(module, args, kwargs, self.context)
            self._passes.append((module, own))

        def succeed(module: Module, _args: Any, _output: Any) -> None:
            if self._passes and self._passes[0][0] is module:
                self._commit()

        def leave(_module: Module, _args: Any, _output: Any) -> None:
            del self._passes[-1:]

        for name in sorted(names):
            module = model.get_submodule(name)
            self.register(module.register_forward_pre_hook, enter, with_kwargs=True)
            self.register(module.register_forward_hook, succeed)
            self.register(module.register_forward_hook, leave, always_call=True)

    # --- counting -----------------------------------------------------------------------------

    @property
    def context(self) -> Any:
        """The context of the innermost pass in progress, None outside any."""
        return self._passes[-1][1] if self._passes else None

    def wants(self, module: Module, layer: int, *, without_gradients: bool = True) -> bool:
        """Whether the pass of *module* that is in progress counts for *layer*."""
        gradients = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: activations are recomputed
            return not self._evaluation and module.training and gradients and layer not in self._forward
        if self._evaluation:
            return True
        if not module.training:
            return False
        counted = gradients or (without_gradients and bool(self._passes) and self._gradients)
        (self._forward.add if counted else self._forward.discard)(layer)
        return counted

    def add(self, layer: int, counts: Tensor) -> None:
        """Add *counts* (experts,), a tensor on any device, to the step in progress."""
        self._pending.append((layer, counts.detach().to(torch.int64, copy=True)))
        if not self._passes:
            self._commit()

    def _commit(self) -> None:
        for layer, fresh in self._pending:
            held = self._counts.get(layer)
            self._counts[layer] = fresh if held is None else held + fresh
        self._pending = []

    def assume(self, assumption: str) -> None:
        """Record what is assumed about the counts in the trace's metadata, where this rank has the recorder."""
        if self.recorder is not None:
            self.recorder.assume(assumption)

    def step(self, step: int | None = None) -> None:
        """End the step: sum over ranks, move to the host once, and record it under that number.

        Raises `TraceError` when nothing was counted, or not exactly.
        """
        if not self._counts:
            way_out = "call model.train(), or give evaluation=True to count passes without training"
            raise TraceError("the watched modules", "no pass was counted in this step", way_out)
        largest, self._largest = self._largest, []
        if largest and float(torch.stack(largest).max()) >= FLOAT32_EXACT:
            problem = f"has reached {FLOAT32_EXACT:,}, from where float32 does not count exactly"
            raise TraceError("a watched buffer", problem, "set it back to zero after every step")
        layers = sorted(self._counts)
        sizes = [len(self._counts[layer]) for layer in layers]
        together = sum_over_ranks(torch.cat([self._counts[layer] for layer in layers]), self._group)
        self._counts, self._forward = {}, set()
        if self.recorder is not None:
            for layer, counts in zip(layers, together.cpu().split(sizes)):
                self.recorder.add(layer, counts.numpy())
            self.recorder.step(step)

    def register(self, register: Callable[..., Any], call: Callable[..., None], **settings: Any) -> None:
        """Add a hook by *register*, a method of a module; `close` removes it."""
        self._handles.append(register(Hook(call), **settings))

    def close(self) -> None:
        """Remove the hooks; the recorder stays open."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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
    number in its name. *settings* are those of `Watch`. Raises `TraceError` if no module has such a buffer.
    """
    watch = Watch(recorder, **settings)
    buffers = {
        path: (module, name)
        for path, module in model.named_modules()
        for name in [name for name in BUFFERS if isinstance(getattr(module, name, None), torch.Tensor)][:1]
    }
    if not buffers:
        way_out = "watch the routers by hand with Watch.indices, Watch.chosen or Watch.counts"
        raise TraceError(type(model).__name__, f"has no buffer named {', '.join(BUFFERS)}", way_out)
    layers = layers_of({path: module for path, (module, _) in buffers.items()})
    for path, (module, name) in buffers.items():
        watch.buffer(module, layers[path], name, summed=name.startswith("global"))
    watch.within(model, buffers)
    return watch


def layers_of(modules: dict[str, Module]) -> dict[str, int]:
    """The layer of each of *modules*, by their names in the model: its `layer_number` or the last number in its name.

    Raises `TraceError` if the model has neither, or if two are one layer: their counts would be added up.
    """
    layers: dict[str, int] = {}
    for path, module in modules.items():
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        number = getattr(module, "layer_number", None)
        if number is None and not numbers:
            raise TraceError(path or type(module).__name__, "has no layer number in its name", "watch it by hand")
        layer = int(numbers[-1] if number is None else number)
        for other in (other for other, taken in layers.items() if taken == layer):
            raise TraceError(path, f"is layer {layer}, as is {other}", "watch one part of the model, or each by hand")
        layers[path] = layer
    return layers
