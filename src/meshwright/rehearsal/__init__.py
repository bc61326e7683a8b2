"""The fake world: the real training step, executed for one rank of any world without devices or peers."""
