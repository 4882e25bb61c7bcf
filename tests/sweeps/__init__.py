"""Long sweeps: each module has ``sweep(count, seed)``, which counts what it tried and found."""
