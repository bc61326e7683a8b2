"""Train: the step, the loop around it, its data, optimiser and metrics."""
