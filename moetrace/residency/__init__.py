"""Which experts stay in fast memory: resident sets by forecast, caches, and what each covers of what followed."""
