"""The operators registered with ``torch.library``, and which backend computes them."""
