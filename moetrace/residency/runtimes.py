"""Runtimes that read which experts to keep: what each reads, and how it is started.

A new one is a `File` (its content and its flags) that names the source it was written after, and a place in `RUNTIMES`.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError
from moetrace.placement.systems.base import MOST_LAYERS, TOKENS, File, renumbered

# The module of the experts of a layer in most architectures of ExLlamaV3 (exllamav3/architecture at cc29572f); the
# reader looks its own key up and leaves the others alone.
EXLLAMAV3_KEYS = ("model.layers.{}.mlp", "model.layers.{}.block_sparse_moe", "model.language_model.layers.{}.mlp")
# The buffer of llama.cpp's reader: a longer line would be taken for two.
LONGEST = 4095


@dataclass(frozen=True)
class ResidentSets:
    """The experts to keep of each layer, by the number of the layer in the model.

    *sets* are the experts, most loaded first, and *shares* the forecast share of every expert of the layer, both
    from expert 0 on; the model has *model_layers* layers, 0 if that is not known.
    """

    sets: Mapping[int, Sequence[int]]
    shares: Mapping[int, Sequence[float]]
    model_layers: int = 0

    def with_first_layer(self, first_layer: int | None) -> ResidentSets:
        """The same with *first_layer* as the number of its first layer, the others as far from it as they were."""
        names = renumbered(sorted(self.sets), first_layer)
        sets = {names[layer]: own for layer, own in self.sets.items()}
        return replace(self, sets=sets, shares={names[layer]: own for layer, own in self.shares.items()})

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len(next(iter(self.shares.values())))

    @property
    def most(self) -> int:
        """Resident experts of the layer that has most."""
        return max(map(len, self.sets.values()))

    @property
    def total(self) -> int:
        """Resident experts of all layers."""
        return sum(map(len, self.sets.values()))

    @property
    def equal(self) -> bool:
        """Whether every layer has as many."""
        return self.total == self.most * len(self.sets)

    def scores(self, layer: int) -> list[int]:
        """A number for each expert of a layer, by which the resident ones come first, in their order."""
        scores = np.rint(np.array(self.shares[layer]) * TOKENS).astype(int)
        scores[list(self.sets[layer])] = 2 * TOKENS + np.arange(len(self.sets[layer]))[::-1]
        return scores.tolist()

    def every_layer(self) -> range:
        """The numbers of all layers of the model; raises `SettingError` for one that it cannot have."""
        last = max(self.sets)
        if min(self.sets) < 0 or last > MOST_LAYERS or 0 < self.model_layers <= last:
            known = f"one of the {self.model_layers} layers of the model" if self.model_layers else "a layer of a model"
            raise SettingError(f"layer {last} is not {known}: check --model-layers and --first-layer")
        return range(max(last + 1, self.model_layers))

    def as_lists(self) -> dict[str, list[int]]:
        """The experts by layer, as JSON has them."""
        return {str(layer): list(own) for layer, own in self.sets.items()}


# --- plain lists, for programs of one's own ------------------------------------------------------------------------


def _csv_rows(sets: ResidentSets) -> bytes:
    rows = [
        f"{layer},{rank},{expert},{sets.shares[layer][expert]:.9g}"
        for layer, own in sets.sets.items()
        for rank, expert in enumerate(own, 1)
    ]
    return "\n".join(["layer,rank,expert,share", *rows, ""]).encode()


JSON = File[ResidentSets]("JSON", ".json", lambda sets: json.dumps(sets.as_lists()).encode(), lambda _, path: path)
CSV = File("CSV", ".csv", _csv_rows, lambda _, path: path)


# --- ExLlamaV3: selection counts of each expert by layer, of which the GPU keeps the highest -----------------------
# Read in turboderp-org/exllamav3: exllamav3/modules/block_sparse_mlp_cpu.py at 0cec3813 takes the counts of
# json.load(...)[module key] where dynamic swapping is off and keeps all but the last --moe_cpu_split experts by
# count; pull request 315, exllamav3/model/moe_profile.py at 1149e2f0, reads the same file as a profile.


def _counts_by_module(sets: ResidentSets) -> bytes:
    if not sets.equal:
        raise SettingError("it keeps as many experts in every layer: use --slots")
    modules = ((key.format(layer), layer) for key in EXLLAMAV3_KEYS for layer in sets.sets)
    return json.dumps({module: sets.scores(layer) for module, layer in modules}).encode()


EXLLAMAV3 = File(
    "ExLlamaV3",
    ".exllamav3.json",
    _counts_by_module,
    lambda sets, path: (
        f"EXL3_MOE_CPU_SWAP=0 EXL3_MOE_CPU_SPLIT_STATS={quote(path)} with -mcs {sets.experts - sets.most}"
    ),
)


# --- KTransformers: selection counts of each expert, of which the highest of all layers together go to the GPU -----
# Read in kvcache-ai/sglang at 04653fa8, python/sglang/srt/layers/moe/kt_ep_wrapper.py: the strategy frequency loads
# logical_count (samples, layers of the model, experts) with torch.load(weights_only=True), sums the samples and
# keeps the highest cells, for so many experts per MoE layer or for a ratio of all. In kvcache-ai/ktransformers,
# kt-kernel/python/experts_base.py has the choice, generate_gpu_experts_masks: torch.topk over all layers.


def _counts_of_layers(sets: ResidentSets) -> bytes:
    """A row for every layer of the model; those without a set, such as dense ones, have zeros, which never win."""
    none = [0] * sets.experts
    rows = [sets.scores(layer) if layer in sets.sets else none for layer in sets.every_layer()]
    return saved({"logical_count": np.array([rows])})


def saved(tensors: dict[str, NDArray[np.int64]]) -> bytes:
    """What ``torch.save`` writes of a dict of 64-bit tensors, without torch.

    A ZIP archive of a pickle of protocol 2, in which a tensor is a call with the key of its storage, its shape and
    strides, and of the storages as they are in memory.
    """
    entries = {"version": b"3\n", "byteorder": b"little"}
    pickle = b"\x80\x02}"
    for key, (name, tensor) in enumerate(tensors.items()):
        entries[f"data/{key}"] = np.ascontiguousarray(tensor, "<i8").tobytes()
        strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(tensor.ndim)]
        storage = b"(" + _text("storage") + b"ctorch\nLongStorage\n" + _text(str(key)) + _text("cpu")
        storage += _number(tensor.size) + b"tQ"
        pickle += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0)
        pickle += _tuple(tensor.shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)RtRs"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # stored, with the date of a ZIP file that has none
        for entry, content in {"data.pkl": pickle + b".", **entries}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), content)
    return file.getvalue()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple(numbers: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def _ratio_or_number(sets: ResidentSets, path: str) -> str:
    start = f"--kt-expert-placement-strategy frequency --init-expert-location {quote(path)}"
    if sets.equal:
        return f"{start} --kt-num-gpu-experts {sets.most}"
    # A ratio is multiplied by the number of all experts and cut to a whole number.
    return f"{start} --kt-gpu-experts-ratio {(sets.total + 0.5) / (len(sets.sets) * sets.experts):.8f}"


KTRANSFORMERS = File("KTransformers", ".ktransformers.pt", _counts_of_layers, _ratio_or_number)


# --- llama.cpp, the fork with a profile: a routing log, of which each layer's most frequent experts are cached -----
# Read in thecodacus/llama.cpp, branch perf at 8e5bc28c: init_moe_expert_cache in src/llama-model.cpp counts the
# experts of lines "position,layer,expert,..." and caches the most frequent ones, at most --moe-cache-slots per
# layer. The cache in ggml-org/llama.cpp (src/llama-moe-cache.cpp at 4b060f27) is an LRU cache and reads no list.


def _routing_log(sets: ResidentSets) -> bytes:
    """The first expert of a layer, the first two, and so on: each has one line more than the next."""
    lines = [
        f"{position},{layer},{','.join(map(str, own[: position + 1]))}"
        for layer, own in sets.sets.items()
        for position in range(len(own))
    ]
    # Of so many experts that their names do not fit a line, the least loaded ones tie.
    cut = [line if len(line) < LONGEST else line[:LONGEST].rpartition(",")[0] for line in lines]
    return "\n".join([*cut, ""]).encode()


LLAMA_CPP = File(
    "llama.cpp (thecodacus, branch perf)",
    ".llama-cpp.csv",
    _routing_log,
    lambda sets, path: f"-ncmoe 99 --moe-cache-profile {quote(path)} --moe-cache-slots {sets.most}",
)


# --- ESFT: the experts to fine-tune of each layer; all others are frozen -------------------------------------------
# Read in deepseek-ai/ESFT at 579a7711: to_esft in esft.py, which takes experts, shared_experts and
# non_expert_modules from the file, and train.py, which takes its path; results/expert_configs/ has such files.


def _trained(sets: ResidentSets) -> bytes:
    return json.dumps({"experts": sets.as_lists(), "shared_experts": False, "non_expert_modules": False}).encode()


ESFT = File("ESFT", ".esft.json", _trained, lambda _, path: f"train.py --expert_config={quote(path)}")

# In this order files are written.
RUNTIMES: tuple[File[ResidentSets], ...] = (JSON, CSV, EXLLAMAV3, KTRANSFORMERS, LLAMA_CPP, ESFT)
