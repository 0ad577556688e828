"""The Triton backends on the public table, on a GPU; tests/triton runs their kernels on CPU tensors."""

import pytest

from attnreg.testing import BackendConformance, cases
from attnreg_triton import attnreg_backends

pytestmark = pytest.mark.gpu


BACKENDS = {backend.name: backend for backend in attnreg_backends()}


class TestTritonFlash(BackendConformance):
    backend = BACKENDS["triton_flash"]
    device = "cuda"
    configurations = 6


class TestTritonDecode(BackendConformance):
    backend = BACKENDS["triton_decode"]
    device = "cuda"
    configurations = 6


class TestTritonBlockSparse(BackendConformance):
    backend = BACKENDS["triton_block_sparse"]
    device = "cuda"
    configurations = 6


class TestTritonFp8(BackendConformance):
    backend = BACKENDS["triton_fp8"]
    device = "cuda"
    configurations = 6


@pytest.mark.slow
class TestTritonFlashLarger(BackendConformance):
    backend = BACKENDS["triton_flash"]
    device = "cuda"
    cases = cases(slow=True)
