"""Building data frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def stacked(frames: Sequence[pd.DataFrame], columns: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of *frames* one after the other; without any, an empty frame with *columns*, or else with theirs."""
    import pandas as pd

    filled = [frame for frame in frames if len(frame)]
    if filled:
        return pd.concat(filled, ignore_index=True)
    return frames[0] if frames and not columns else pd.DataFrame(columns=list(columns))
