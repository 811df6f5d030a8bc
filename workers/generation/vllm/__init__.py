"""Generation engine vllm: vLLM inside the host processes."""
