"""Training engine threed: pipeline x tensor x data parallelism."""
