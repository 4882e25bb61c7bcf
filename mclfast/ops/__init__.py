"""Operators registered with ``torch.library``, and the choice of the backend that runs them."""
