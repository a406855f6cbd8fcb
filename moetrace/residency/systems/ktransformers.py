"""KTransformers: selection counts of each expert, of which the highest of all layers together go to the GPU.

Read in kvcache-ai/sglang at 04653fa8, python/sglang/srt/layers/moe/kt_ep_wrapper.py: the strategy ``frequency`` loads
``logical_count`` (samples, layers of the model, experts) with ``torch.load(weights_only=True)``, sums the samples and
keeps the highest cells, for so many experts per MoE layer or for a ratio of all. In kvcache-ai/ktransformers,
kt-kernel/python/experts_base.py has the choice, ``generate_gpu_experts_masks``: ``torch.topk`` over all layers.
"""

import io
import struct
import zipfile
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets


def _content(sets: ResidentSets) -> bytes:
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


def _flags(sets: ResidentSets, path: str) -> str:
    start = f"--kt-expert-placement-strategy frequency --init-expert-location {quote(path)}"
    if sets.equal:
        return f"{start} --kt-num-gpu-experts {sets.most}"
    # A ratio is multiplied by the number of all experts and cut to a whole number.
    return f"{start} --kt-gpu-experts-ratio {(sets.total + 0.5) / (len(sets.sets) * sets.experts):.8f}"


KTRANSFORMERS = File("KTransformers", ".ktransformers.pt", _content, _flags)
