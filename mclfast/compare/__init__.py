"""Training methods side by side: plan, runs, statistics over seeds, report."""
