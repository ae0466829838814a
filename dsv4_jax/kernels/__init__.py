"""Functions with several backends: `reference` states the mathematics, `xla` is memory-bounded everywhere."""
