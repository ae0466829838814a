"""Functions with several backends: `reference` states the mathematics, `xla` is memory-bounded everywhere.

`tpu` and `gpu` are Pallas kernels, which `platforms` chooses; docs/kernels.md says what they do.
"""
