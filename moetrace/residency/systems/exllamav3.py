"""ExLlamaV3: selection counts of each expert by layer, of which the GPU keeps the highest.

Read in turboderp-org/exllamav3: exllamav3/modules/block_sparse_mlp_cpu.py at 0cec3813 takes the counts of
``json.load(...)[module key]`` where dynamic swapping is off and keeps all but the last ``--moe_cpu_split`` experts by
count; pull request 315, exllamav3/model/moe_profile.py at 1149e2f0, reads the same file as a profile.
"""

import json
from shlex import quote

from moetrace.errors import SettingError
from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets

# The module of the experts of a layer in most of its architectures (exllamav3/architecture at cc29572f); the reader
# looks its own key up and leaves the others alone.
KEYS = ("model.layers.{}.mlp", "model.layers.{}.block_sparse_moe", "model.language_model.layers.{}.mlp")


def _content(sets: ResidentSets) -> bytes:
    if not sets.equal:
        raise SettingError("it keeps as many experts in every layer: use --slots")
    return json.dumps({key.format(layer): sets.scores(layer) for key in KEYS for layer in sets.sets}).encode()


def _flags(sets: ResidentSets, path: str) -> str:
    return f"EXL3_MOE_CPU_SWAP=0 EXL3_MOE_CPU_SPLIT_STATS={quote(path)} with -mcs {sets.experts - sets.most}"


EXLLAMAV3 = File("ExLlamaV3", ".exllamav3.json", _content, _flags)
