"""The decoder: one model for every layout; a single device is the parallel code at degree 1."""
