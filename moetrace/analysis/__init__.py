"""What does the load do? Noise and drift, states, fluctuation, imbalance: numbers from one trace, layer by layer."""
