"""What several tests share: inputs, reference forms, checks."""
