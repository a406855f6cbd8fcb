"""Names that mean the same in code, tables, JSON and prose, each spelled in one place."""

from typing import Literal

# States of a layer: the paper's two (arXiv 2404.16914), and where there is too little data for either.
STATES = STABLE, TRANSIENT, UNKNOWN = "stable", "transient", "unknown"
# The mean of the last 1,000 steps, by which SGLang and vLLM plan: what predictors and plans are compared with.
BASELINE = "window_mean"
# Strategies that place experts without a predictor: neighbours together, the plan deployed today, perfect foresight.
DEFAULT, DEPLOYED, ORACLE = "default", "deployed", "oracle"
# How bad an imbalance is, from good to bad: `analysis.imbalance` has the thresholds.
SEVERITIES = OK, MODERATE, SEVERE, COLLAPSED = "ok", "moderate", "severe", "collapsed"

# Verdicts on balancing.
WORTH_IT, NOT_WORTH_IT, NO_EVIDENCE = "worth it", "not worth it", "not enough evidence"
DEPENDS = "depends on the hardware"
# The folder of traces and results, and the variable that names another one.
WORKSPACE, DEFAULT_WORKSPACE = "MOETRACE_WORKSPACE", "moetrace-out"
# The layout of an exported trace by the ending of its file; others are long.
EXPORTED = {".csv": "csv", ".npz": "npz"}
# How several dumps become one trace, and which passes of a serving dump are taken.
Merge = Literal["sum", "experts", "layers", "steps"]
Phase = Literal["prefill", "decode"]
# Of JSON documents, on stdout and in files: it changes when a field changes its meaning or goes.
SCHEMA_VERSION = 1
