"""What tests of kernels share."""

import pytest

from dsv4_jax.kernels.sparse_attention import gpu, tpu_fetch

INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"  # not public in jax 0.10


@pytest.fixture
def interpreter():
    """Parameters of the interpreter of Pallas' Mosaic GPU backend."""
    yield pytest.importorskip(f"{INTERPRETER}.params").InterpretGPUParams()
    pytest.importorskip(f"{INTERPRETER}.interpret_pallas_call").reset_gpu_interpret_mode_state()  # as after a failure


@pytest.fixture
def small_fetches(monkeypatch):
    """Few queries and rows at a time in kernels that fetch rows: few already need several steps, and padding."""
    for name, few in {"QUERIES": 4, "UNROLL": 2, "TILE": 4}.items():
        monkeypatch.setattr(tpu_fetch, name, few)


@pytest.fixture
def blackwell(monkeypatch):
    monkeypatch.setattr(gpu, "is_blackwell", lambda: True)


@pytest.fixture
def tensor_memory(interpreter, blackwell):
    """Parameters of an interpreter with Blackwell's tensor memory, which fails where it finds a race."""
    if not hasattr(pytest.importorskip(f"{INTERPRETER}.gpu_callbacks"), "tcgen05_mma"):
        pytest.skip("the interpreter of this jax has no tensor memory")
    return type(interpreter)(detect_races=True)
