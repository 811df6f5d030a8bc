"""The model that every training engine runs: loading, attention, tensor parallelism, log-probs."""
