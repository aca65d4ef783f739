"""Experiments: comparisons of methods over many seeds, and the audit of the observations."""
