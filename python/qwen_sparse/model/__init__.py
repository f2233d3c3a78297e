"""Released models: configs and files, tokenizer, KV cache, and the decoder with its parts."""
