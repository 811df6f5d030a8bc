"""Parts that several training engines use: micro-batches, optimizer, metrics, checkpoints,
export."""
