"""Inputs, reference forms and checks that several tests share."""
