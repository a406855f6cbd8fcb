"""Ways to plan that belong to no serving system: none, one plan from a file, and moetrace's own."""

from moetrace.placement.policies import MOVING, Policy, plan_once_for_balance, replan_by_state, replan_by_steps
from moetrace.placement.systems.base import System

NONE = System(
    "none",
    "the default placement",
    lambda _: [Policy("none", 0, 0, replan_by_steps)],
    launch=lambda *_: "",  # needs nothing
)
STATIC = System(
    "static",
    "a single plan, made once and then kept,",
    lambda _: [Policy("static", 1000, None, plan_once_for_balance)],
)
MOETRACE = System(
    "moetrace",
    "a plan that changes in few places every {interval:,} steps, from the load of the last {window:,},",
    lambda _: [Policy("moetrace", 1000, every, replan_by_steps) for every in (1000, 500)],
    planned=True,
)
BY_STATE = System(
    "moetrace by state",
    "a plan made when a layer settles, and changed every {interval:,} steps while its load moves,",
    lambda _: [Policy("moetrace by state", 1000, MOVING, replan_by_state)],
    planned=True,
)
