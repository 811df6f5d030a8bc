"""Training engine fsdp: FSDP2 over tensor parallelism."""
