"""How good a model is: metrics from positions, from scores, and from labels."""
