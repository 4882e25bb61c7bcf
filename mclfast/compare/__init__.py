"""Comparison of training methods: design, runs, statistics over seeds, report."""
