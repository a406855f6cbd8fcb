"""llama.cpp, the fork with a profile: a routing log, of which each layer's most frequent experts are cached.

Read in thecodacus/llama.cpp, branch perf at 8e5bc28c: ``init_moe_expert_cache`` in src/llama-model.cpp counts the
experts of lines ``position,layer,expert,...`` and caches the most frequent ones, at most ``--moe-cache-slots`` per
layer. The cache in ggml-org/llama.cpp (src/llama-moe-cache.cpp at 4b060f27) is an LRU cache and reads no list.
"""

from shlex import quote

from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets

# The reader's buffer: a longer line would be taken for two.
LONGEST = 4095


def _content(sets: ResidentSets) -> bytes:
    """The first expert of a layer, the first two, and so on: each has one line more than the next."""
    lines = [
        f"{position},{layer},{','.join(map(str, own[: position + 1]))}"
        for layer, own in sets.sets.items()
        for position in range(len(own))
    ]
    # Of so many experts that their names do not fit a line, the least loaded ones tie.
    cut = [line if len(line) < LONGEST else line[:LONGEST].rpartition(",")[0] for line in lines]
    return "\n".join([*cut, ""]).encode()


def _flags(sets: ResidentSets, path: str) -> str:
    return f"-ncmoe 99 --moe-cache-profile {quote(path)} --moe-cache-slots {sets.most}"


LLAMA_CPP = File("llama.cpp (thecodacus, branch perf)", ".llama-cpp.csv", _content, _flags)
