"""Stored embeddings: memory banks, queues of keys, and the sampler that draws from them."""
