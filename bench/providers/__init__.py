"""The implementations that are measured side by side."""
