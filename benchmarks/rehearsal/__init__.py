"""What can be known about a run on GPUs without one (docs/gpu.md)."""
