"""LoRA and context parallelism against the plain run: errors, bytes and seconds."""
