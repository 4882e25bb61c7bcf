"""Stored embeddings: memory banks, queues of keys, and a sampler that draws from banks."""
