"""Where do traces and results lie? A plain folder: traces, kept results, and the tasks that make them."""
