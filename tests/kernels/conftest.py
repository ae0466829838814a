"""What tests of kernels share."""

import pytest

from dsv4_jax.kernels.sparse_attention import gpu

INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"  # not public in jax 0.10


@pytest.fixture
def interpreter():
    """Parameters of the interpreter of Pallas' Mosaic GPU backend."""
    yield pytest.importorskip(f"{INTERPRETER}.params").InterpretGPUParams()
    pytest.importorskip(f"{INTERPRETER}.interpret_pallas_call").reset_gpu_interpret_mode_state()  # as after a failure


@pytest.fixture
def blackwell(monkeypatch):
    monkeypatch.setattr(gpu, "is_blackwell", lambda: True)


@pytest.fixture
def tensor_memory(interpreter, blackwell):
    """Parameters of the interpreter, which fails where it finds a race."""
    if not hasattr(pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"), "tcgen05_mma"):
        pytest.skip("the interpreter of this jax has no tensor memory")
    return type(interpreter)(detect_races=True)
