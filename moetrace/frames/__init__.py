"""Tidy frames of what was computed: what is printed, written, and drawn from.

One row is one observation; columns carry the words of the project and full precision.
"""

from moetrace.backtest import stacked
from moetrace.frames.placement import best_strategy, placement_frame, placement_summary, plans_frame
from moetrace.frames.predictability import predictability_frames
from moetrace.frames.replanning import ENOUGH, plan_holds, replanning_frame, replanning_summary
from moetrace.frames.scores import means_frame, score_frames, summary_frame
from moetrace.frames.states import course_frames, state_frames
from moetrace.frames.traces import findings_frame, traces_frame

__all__ = [
    "ENOUGH",
    "best_strategy",
    "course_frames",
    "findings_frame",
    "means_frame",
    "placement_frame",
    "placement_summary",
    "plan_holds",
    "plans_frame",
    "predictability_frames",
    "replanning_frame",
    "replanning_summary",
    "score_frames",
    "stacked",
    "state_frames",
    "summary_frame",
    "traces_frame",
]
