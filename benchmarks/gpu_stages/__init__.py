"""What `benchmarks/gpu.py` runs: each stage is a function of a folder for records. It returns its last line."""
