"""Helpers for every package: checks, files, modules, random states, settings, tensors, machine."""
