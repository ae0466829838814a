"""What every test shares: the CPU and a compilation cache."""

import os
from pathlib import Path

# Before jax is imported, so that subprocesses inherit them too. Compiling dominates these tests: a second run is fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4-jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
