"""What every test shares: the CPU, a compilation cache, and how hard XLA works on a program."""

import gc
import os
from pathlib import Path

import pytest

# Before jax is imported, so that subprocesses inherit them too. Compiling dominates these tests: a second run is fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4-jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# LLVM's work on a program's speed is half of its compilation; it is skipped except in modules marked `optimized`, which
# test what it makes. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles everything as users do.
_LIGHTLY = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1").lower() in ("1", "true")
# Tracing makes millions of objects that stay: looking through them for garbage took a tenth of the tests' time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def compiled_for_its_tests(request):
    """The module's choice of optimisation; its programs are forgotten behind it."""
    if not _LIGHTLY:
        yield
        return
    import jax

    lightly = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", lightly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(lightly))  # of subprocesses
    yield
    jax.clear_caches()
