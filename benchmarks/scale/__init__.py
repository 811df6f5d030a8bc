"""What LoRA and context parallelism change against the plain run: errors, bytes and seconds."""
