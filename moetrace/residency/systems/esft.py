"""ESFT: the experts to fine-tune of each layer; all others are frozen.

Read in deepseek-ai/ESFT at 579a7711: ``to_esft`` in esft.py, which takes ``experts``, ``shared_experts`` and
``non_expert_modules`` from the file, and train.py, which takes its path; results/expert_configs/ has such files.
"""

import json
from shlex import quote

from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets, lists


def _content(sets: ResidentSets) -> bytes:
    return json.dumps({"experts": lists(sets), "shared_experts": False, "non_expert_modules": False}).encode()


ESFT = File("ESFT", ".esft.json", _content, lambda _, path: f"train.py --expert_config={quote(path)}")
