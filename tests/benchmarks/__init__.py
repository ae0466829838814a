"""Measurements: each is a module to run, and prints a table with a ratio against a named baseline of the same run."""
