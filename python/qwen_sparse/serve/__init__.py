"""An OpenAI-compatible server: continuous batching, prefix reuse, visible prefill."""
