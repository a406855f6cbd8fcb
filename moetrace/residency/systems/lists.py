"""Plain lists, for programs of one's own: JSON, ``{"layer": [experts]}``, and CSV, a row for each resident expert."""

import json

from moetrace.placement.systems.base import File
from moetrace.residency.systems.base import ResidentSets, lists


def _csv(sets: ResidentSets) -> bytes:
    rows = [
        f"{layer},{rank},{expert},{sets.shares[layer][expert]:.9g}"
        for layer, own in sets.sets.items()
        for rank, expert in enumerate(own, 1)
    ]
    return "\n".join(["layer,rank,expert,share", *rows, ""]).encode()


JSON = File[ResidentSets]("JSON", ".json", lambda sets: json.dumps(lists(sets)).encode(), lambda _, path: path)
CSV = File("CSV", ".csv", _csv, lambda _, path: path)
