"""Several processes, one trace: the sum over ranks, or one file for each rank to be summed later.

Ranks that see the same tokens (tensor parallelism) must not be summed: give the group of those that
see different ones. Tested with two gloo processes; NCCL sums the same 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrace.record.recorder import Recorder


def sum_over_ranks(counts: Any, group: Any = None) -> Any:
    """The sum of the tensor *counts* over the ranks of *group*, all of them unless given.

    Changes *counts*, and returns it; without `torch.distributed` it is the sum already.
    Every rank has to call it, with a tensor of the same shape.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    return counts


def rank(group: Any = None) -> int:
    """The number of this process within *group*, 0 without `torch.distributed`."""
    import torch.distributed as dist

    return int(dist.get_rank(group)) if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def shared_recorder(path: str | Path, **settings: Any) -> Iterator[Recorder | None]:
    """The recorder of all ranks: a `Recorder` on the first rank, None on the others.

    Hand it to a `moetrace.record.torch.Watch`, which sums over the ranks; *settings* are the recorder's.
    """
    if rank() == 0:
        with Recorder(path, **settings) as recorder:
            yield recorder
    else:
        yield None


def rank_path(path: str | Path) -> Path:
    """*path* with the number of this rank before its suffix: ``run.rank3.parquet``.

    For processes that record each on its own; the files are made one trace afterwards.
    """
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank()}{path.suffix}")
