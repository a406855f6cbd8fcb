"""How long an expert takes by its tokens on this device: ``python -m moetrace.placement.measure -o curve.csv``.

An expert is SwiGLU's three matrices. So many of them, each with the same number of tokens, run as one batched product
on a GPU, as grouped kernels do, and one after the other on a CPU; together they are larger than the caches, and the
time is that of one. Needs `moetrace[torch]`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moetrace.errors import MoetraceError, SettingError
from moetrace.files import write_text
from moetrace.placement.step_time import CURVE_COLUMNS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Bytes of weights that no cache holds.
BEYOND_CACHES = 1 << 29


def measured(
    hidden: int,
    ffn: int,
    dtype: str = "bfloat16",
    tokens: Sequence[int] = TOKENS,
    device: str | None = None,
    experts: int | None = None,
    repeats: int = 20,
) -> list[tuple[int, float]]:
    """The microseconds of one expert for each number of *tokens*: medians of *repeats*, after two for warming up.

    An expert has the matrices (*hidden*, 2 * *ffn*) and (*ffn*, *hidden*) of torch's *dtype*. *device* is torch's, CUDA
    where there is one by default; so many *experts* run at once, by default as many as no cache holds.
    Raises `SettingError` if torch is missing, or lacks the dtype or device.
    """
    try:
        import torch
    except ImportError:
        raise SettingError("the curve is measured with torch: pip install 'moetrace[torch]'") from None
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise SettingError(f"torch has no dtype {dtype!r}: bfloat16, float16 or float32")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    number = experts or -(-BEYOND_CACHES // (3 * hidden * ffn * kind.itemsize))
    try:
        up = torch.randn(number, hidden, 2 * ffn, device=where).to(kind)
        down = torch.randn(number, ffn, hidden, device=where).to(kind)
    except RuntimeError as error:
        raise SettingError(f"{number} experts do not run on {where!r}: {str(error).splitlines()[0]}") from None

    def run(x: Any) -> None:
        if x.is_cuda:
            expert(x, up, down)
            torch.cuda.synchronize()
        else:
            for own in zip(x, up, down):  # one expert after the other
                expert(*own)

    found = []
    with torch.inference_mode():
        for n in tokens:
            x = torch.randn(number, n, hidden, device=where).to(kind)
            seconds = timeit.repeat(partial(run, x), number=1, repeat=repeats + 2)
            found.append((n, 1e6 * statistics.median(seconds[2:]) / number))
    return found


def expert(x: Any, up: Any, down: Any) -> Any:
    """What an expert makes of tokens *x* (tokens, hidden), or several of theirs; see `measured` for its matrices."""
    import torch

    gate, value = (x @ up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value) @ down


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the curve; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moetrace.placement.measure", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, required=True, help="hidden size of the model")
    parser.add_argument("--ffn", type=int, required=True, help="intermediate size of an expert")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one by default")
    parser.add_argument("--experts", type=int, help="experts that run at once")
    parser.add_argument("--repeats", type=int, default=20, help="runs for each number of tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens")
    parser.add_argument("-o", "--output", type=Path, help="file of the curve; printed by default")
    own = parser.parse_args(argv)
    try:
        curve = measured(own.hidden, own.ffn, own.dtype, sorted(set(own.tokens)), own.device, own.experts, own.repeats)
        text = "\n".join([",".join(CURVE_COLUMNS), *(f"{tokens},{time:.3f}" for tokens, time in curve)]) + "\n"
        if own.output is None:
            sys.stdout.write(text)
        else:
            write_text(own.output, text, force=True)
    except MoetraceError as error:
        sys.stderr.write(f"moetrace: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
