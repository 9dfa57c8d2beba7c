"""Text, token by token: the KV cache, sampling, the compiled loop, and what people call."""
