"""Losses and training steps written as published, which the fused ones are measured against."""
