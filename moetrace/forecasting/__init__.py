"""How well can the load be known? Predictors, backtests, errors, intervals."""
