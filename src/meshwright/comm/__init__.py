"""The only door to torch.distributed: meshes, collectives that return a `Pending`, and conjugate autograd pairs."""
