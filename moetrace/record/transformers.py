"""Counting in Hugging Face Transformers: the experts really chosen, padding left out.

In version 5 nearly every model of this kind passes the chosen indices to a module of experts, after all
bias, group limits and jitter; they are counted there. Older and custom models whose router gives back
integer indices (`DeepseekV3TopkRouter`, `MoEGate`) are counted at the router. Any other model that gives
back `router_logits` is counted by their top-k, which is listed in the trace's assumptions.

Tested with tiny Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GPT-OSS and DeepSeek-V3 of version 5, with recomputed
activations and `torch.compile`. Not tested: models spread with Transformers' own expert parallelism, which renumbers
the indices on each rank, and full-size models.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from moetrace.errors import TraceError
from moetrace.record.distributed import rank
from moetrace.record.recorder import Recorder
from moetrace.record.torch import Module, Pick, Tensor, Watch, count_indices, layers_of

# What the experts' forward calls the indices: all but two models, and those two.
INDEX_ARGUMENTS = ("top_k_index", "router_indices")
EXPERT_NUMBERS = ("num_experts", "n_routed_experts", "num_routed_experts")
# What a mask adds to the scores of pairs that may attend to each other is above this; models use -1e4 and less.
LOWEST_BIAS = -9000
BY_HAND = "watch its routers by hand with moetrace.record.torch.Watch"
Place = tuple[str, Module, int, Pick]
"""The name of a module, the module, the number of its experts, and how to take the chosen indices."""


def watch(model: Module, recorder: Recorder | None, *, padding: bool = False, **settings: Any) -> Watch:
    """Watch every MoE layer of *model*; call `step` on what comes back at the end of each step.

    Tokens that the `attention_mask` of a call marks as padding do not count unless *padding*.
    *settings* are those of `Watch`. Raises `TraceError` when the model has no experts to watch.
    """
    watching = Watch(recorder, **settings)
    places = _places(model)
    layers = layers_of({path: module for path, module, _, _ in places})

    def weights(pick: Pick, *passed: Any) -> Tensor | None:
        return _weights(watching.context, pick(*passed))

    for path, module, experts, pick in places:
        watching.indices(module, layers[path], experts, pick, partial(weights, pick))
    if not places:
        _watch_logits(model, watching)
    if padding:
        watching.within(model, layers)
    else:
        watching.within(model, layers, partial(_mask_of, watching))
        watching.assume("tokens that the attention mask marks as padding are left out")
    return watching


def _places(model: Module) -> list[Place]:
    """Modules of experts that are given the chosen indices, or else routers: of their output the first integers count.

    Both know the number of experts; the names of routers end in router or gate.
    """

    def argument(name: str, position: int) -> Pick:
        return lambda _module, args, kwargs, _output: kwargs[name] if name in kwargs else args[position]

    def first_integers(module: Module, _args: Any, _kwargs: Any, output: Any) -> Tensor:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, torch.Tensor) and not part.is_floating_point() and part.dtype != torch.bool:
                return part
        raise TraceError(type(module).__name__, "gives back no expert indices", BY_HAND)

    experts: list[Place] = []
    routers: list[Place] = []
    for path, module in model.named_modules():
        sizes = [size for name in EXPERT_NUMBERS if isinstance(size := getattr(module, name, None), int)]
        parameters = list(inspect.signature(module.forward).parameters)
        name = next((name for name in INDEX_ARGUMENTS if name in parameters), None)
        if sizes and name is not None:
            experts.append((path, module, sizes[0], argument(name, parameters.index(name))))
        if sizes and type(module).__name__.lower().endswith(("router", "gate")):
            routers.append((path, module, sizes[0], first_integers))
    return experts or routers


def _mask_of(watching: Watch, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Any) -> Any:
    """Which tokens of a call of *module* are real, from its `attention_mask`: (batch, tokens), None where all are.

    *outer* is the mask of the call around it. A mask for pairs of tokens (batch, ..., queries, keys) marks as padding
    what no query attends to. Models make such masks, and others that cannot be read, from the one they were given:
    *outer* wins against them.
    """
    parameters = inspect.signature(module.forward)
    given = parameters.bind_partial(*args, **kwargs).arguments
    for name, parameter in parameters.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    if "attention_mask" not in given:
        return outer
    mask = given["attention_mask"]
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return mask
    if outer is not None:
        return outer
    if isinstance(mask, torch.Tensor) and mask.dim() > 2:
        attended = mask > LOWEST_BIAS if mask.is_floating_point() else mask != 0
        return attended.flatten(1, -2).any(1)
    watching.assume(f"padding is counted: an attention mask of type {type(mask).__name__} does not mark it")
    return None


def _weights(mask: Tensor | None, chosen: Tensor) -> Tensor | None:
    """1 for each choice (tokens, top_k) of a real token and 0 for padding, by the *mask* (batch, tokens); None for all.

    *chosen* is (tokens, top_k), or (batch, tokens, top_k). With a cache of earlier tokens the mask is longer than the
    call: its end belongs to the call.
    """
    top_k = chosen.shape[-1]
    tokens = chosen.numel() // top_k
    if mask is None or tokens % len(mask):
        return None
    recent = mask[:, -(tokens // len(mask)) :]
    if recent.numel() != tokens:
        return None
    return (recent != 0).reshape(-1).to(chosen.device)[:, None].expand(-1, top_k)


def _watch_logits(model: Module, watching: Watch) -> None:
    """Count the top-k of the `router_logits` that *model* gives back, layers numbered from 0."""
    top_k = next((getattr(model.config, name, None) for name in ("num_experts_per_tok", "top_k")), None)
    if top_k is None:
        raise TraceError(type(model).__name__, "has no known experts, router or top-k", BY_HAND)

    def count(_model: Module, _args: Any, output: Any) -> None:
        if getattr(output, "router_logits", None) is None:
            raise TraceError(type(model).__name__, "gave back no router_logits", "set output_router_logits=True")
        for layer, logits in enumerate(output.router_logits):
            if watching.wants(model, layer):
                flat = logits.detach().reshape(-1, logits.shape[-1])  # (tokens, experts)
                chosen = flat.topk(top_k, dim=-1).indices  # (tokens, top_k)
                watching.add(layer, count_indices(chosen, flat.shape[-1], _weights(watching.context, chosen)))

    watching.register(model.register_forward_hook, count)
    watching.assume(f"counted as the top-{top_k} of router_logits, the layers numbered from 0")


def recorder_callback(path: str | Path, *, padding: bool = False, group: Any = None, **settings: Any) -> Any:
    """A `TrainerCallback` that records the training of a `Trainer` to *path*.

    Continues what was recorded when the trainer starts from a checkpoint, or again in the same process after an
    interrupt or with another batch size, and writes what it holds whenever a checkpoint is saved. The steps of a
    second training in the same process follow those of the first. *settings* are those of `Recorder`.
    """
    from transformers import TrainerCallback

    place = Path(path).absolute()

    class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # torch and transformers are not type-checked
        """Counts every step of the training between its beginning and its end."""

        recorder: Recorder | None = None
        watch: Watch | None = None
        offset = 0  # steps of earlier trainings
        finished = False

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            again = self.watch is not None
            if self.watch is not None:
                self.watch.close()
            if rank() == 0:
                if (interrupted := _unfinished.pop(place, None)) is not None:
                    interrupted.release()
                resumed = {"resume": True, "force": False} if again or state.global_step else {}
                self.recorder = _unfinished[place] = Recorder(path, **(settings | resumed))
                last = self.recorder.last_step
                if self.finished and not state.global_step and last is not None:
                    self.offset = last
                    self.recorder.assume(f"from step {last + 1} on the steps are those of another training")
                elif last is not None:
                    self.recorder.resume_from(self.offset + state.global_step)
            self.finished = False
            self.watch = watch(model, self.recorder, padding=padding, group=group)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            assert self.watch is not None
            self.watch.step(self.offset + state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if self.recorder is not None:
                self.recorder.flush()

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            assert self.watch is not None
            self.watch.close()
            self.finished = True
            if self.recorder is not None:
                self.recorder.close()

    return RecorderCallback()


# Recorders of callbacks in this process by their path; what is left here when a training begins was interrupted.
_unfinished: WeakValueDictionary[Path, Recorder] = WeakValueDictionary()
