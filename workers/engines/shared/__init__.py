"""What the training engines share: micro-batches, optimizer, checkpoints, export."""
