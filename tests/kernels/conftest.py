"""What tests of kernels share."""

import pytest

INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"  # not public in jax 0.10


@pytest.fixture
def interpreter():
    """Parameters of the interpreter of Pallas' Mosaic GPU backend."""
    yield pytest.importorskip(f"{INTERPRETER}.params").InterpretGPUParams()
    pytest.importorskip(f"{INTERPRETER}.interpret_pallas_call").reset_gpu_interpret_mode_state()  # as after a failure
