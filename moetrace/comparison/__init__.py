"""Whether two traces have the same load, and whether the plan and the resident set of one serve the other."""
