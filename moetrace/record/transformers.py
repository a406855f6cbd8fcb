"""Counting in Hugging Face Transformers: the experts really chosen, padding left out.

In version 5 nearly every model of this kind hands the chosen indices to a module of experts, after all
bias, group limits and jitter; they are counted there. Older and custom models whose router gives back
integer indices (`DeepseekV3TopkRouter`, `MoEGate`) are counted at the router. Any other model that gives
back `router_logits` is counted by their top-k, which the trace's assumptions then say.

Tested with tiny Mixtral, Qwen2-MoE, OLMoE and DeepSeek-V3 of version 5. Not tested: models spread with
Transformers' own expert parallelism, which renumbers the indices on each rank, and full-size models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moetrace.errors import TraceError
from moetrace.record.distributed import rank
from moetrace.record.recorder import Recorder
from moetrace.record.torch import Module, Tensor, Watch, count_indices, layers_of

# What the experts' forward calls the indices: all but two models, and those two.
INDEX_ARGUMENTS = ("top_k_index", "router_indices")
EXPERT_NUMBERS = ("num_experts", "n_routed_experts", "num_routed_experts")


def watch(model: Module, recorder: Recorder | None, *, padding: bool = False, **settings: Any) -> Watch:
    """Watch every MoE layer of *model*; call `step` on what comes back at the end of each step.

    Tokens that the `attention_mask` of the call marks as padding do not count unless *padding*.
    *settings* are those of `Watch`. Raises `TraceError` when the model has no experts to watch.
    """
    watching = Watch(recorder, **settings)
    mask = _Mask(model, watching, padding)
    places = list(_experts(model)) or list(_routers(model))
    layers = layers_of({path: module for path, module, _, _ in places})
    for path, module, experts, pick in places:
        watching.indices(module, layers[path], experts, pick, mask.weights_for(pick))
    if not places:
        _watch_logits(model, watching, mask)
    if recorder is not None and not padding:
        recorder.assume("tokens that the attention mask marks as padding are left out")
    return watching


def _experts(model: Module) -> Any:
    """Modules of experts that are given the chosen indices, with their name, size and how to take them."""
    for path, module in model.named_modules():
        size = _size(module)
        parameters = list(inspect.signature(module.forward).parameters)
        name = next((name for name in INDEX_ARGUMENTS if name in parameters), None)
        if size is not None and name is not None:
            yield path, module, size, _argument(name, parameters.index(name))


def _routers(model: Module) -> Any:
    """Modules named as routers that know the number of experts."""
    for path, module in model.named_modules():
        kind = type(module).__name__.lower()
        size = _size(module)
        if size is not None and (kind.endswith("router") or kind.endswith("gate")):
            yield path, module, size, _integers


def _size(module: Module) -> int | None:
    sizes = (getattr(module, name, None) for name in EXPERT_NUMBERS)
    return next((size for size in sizes if isinstance(size, int)), None)


def _argument(name: str, position: int) -> Callable[..., Tensor]:
    def pick(_module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Tensor:
        return kwargs[name] if name in kwargs else args[position]

    return pick


def _integers(module: Module, _args: Any, _kwargs: Any, output: Any) -> Tensor:
    """The first tensor of integers that a router gives back."""
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, torch.Tensor) and not part.is_floating_point() and part.dtype != torch.bool:
            return part
    raise TraceError(
        type(module).__name__, "gives back no expert indices", "watch it by hand with moetrace.record.torch.Watch"
    )


class _Mask:
    """The attention mask of the call that is under way."""

    def __init__(self, model: Module, watching: Watch, padding: bool) -> None:
        self._mask: Tensor = None
        self._signature = inspect.signature(model.forward)
        if not padding:
            watching.owns(model.register_forward_pre_hook(self._keep, with_kwargs=True))

    def _keep(self, _model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def of(self, tokens: int) -> Tensor | None:
        """1 for each of the *tokens* of the call that is none of padding, else 0; None where all count."""
        if self._mask is None or tokens % len(self._mask):
            return None
        # With a cache of earlier tokens the mask is longer than the call: its end belongs to the call.
        recent = self._mask[:, -(tokens // len(self._mask)) :]
        return (recent != 0).reshape(-1) if recent.numel() == tokens else None

    def weights_for(self, pick: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
        def weights(*passed: Any) -> Tensor | None:
            chosen = pick(*passed)  # (tokens, top_k), or (batch, tokens, top_k)
            real = self.of(chosen.numel() // chosen.shape[-1])
            return None if real is None else real.to(chosen.device)[:, None].expand(-1, chosen.shape[-1])

        return weights


def _watch_logits(model: Module, watching: Watch, mask: _Mask) -> None:
    """Count the top-k of the `router_logits` that *model* gives back, layers numbered from 0."""
    top_k = next((getattr(model.config, name, None) for name in ("num_experts_per_tok", "top_k")), None)
    if top_k is None:
        raise TraceError(
            type(model).__name__,
            "has no experts, no router and no top-k that are known",
            "watch its routers by hand with moetrace.record.torch.Watch",
        )

    def count(_model: Module, _args: Any, output: Any) -> None:
        if getattr(output, "router_logits", None) is None:
            raise TraceError(type(model).__name__, "gave back no router_logits", "set output_router_logits=True")
        for layer, logits in enumerate(output.router_logits):
            if watching.wants(model, layer):
                flat = logits.detach().reshape(-1, logits.shape[-1])  # (tokens, experts)
                chosen = flat.topk(top_k, dim=-1).indices  # (tokens, top_k)
                real = mask.of(len(flat))
                weights = None if real is None else real.to(flat.device)[:, None].expand(-1, top_k)
                watching.add(layer, count_indices(chosen, flat.shape[-1], weights))

    watching.owns(model.register_forward_hook(count))
    if watching.recorder is not None:
        watching.recorder.assume(f"counted as the top-{top_k} of router_logits, the layers numbered from 0")


def recorder_callback(path: str | Path, *, padding: bool = False, group: Any = None, **settings: Any) -> Any:
    """A `TrainerCallback` that records the training of a `Trainer` to *path*.

    Goes on with what was recorded when the trainer starts from a checkpoint, and writes what it holds
    whenever one is saved. *settings* are those of `Recorder`.
    """
    from transformers import TrainerCallback

    class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # torch and transformers are not type-checked
        """Counts every step of the training between its beginning and its end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            going_on = {"resume": True} if state.global_step else {}
            self.recorder = Recorder(path, **(settings | going_on)) if rank() == 0 else None
            if self.recorder is not None and state.global_step:
                self.recorder.resume_from(state.global_step)
            self.watch = watch(model, self.recorder, padding=padding, group=group)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.watch.step(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if self.recorder is not None:
                self.recorder.flush()

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.watch.close()
            if self.recorder is not None:
                self.recorder.close()

    return RecorderCallback()
