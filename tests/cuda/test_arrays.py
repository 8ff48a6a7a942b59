"""Arrays of other libraries on the GPU come in by __cuda_array_interface__."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import quantlab as ql
from quantlab.arrays import as_array


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_arrays_of_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(35, device="cuda").reshape(5, 7).to(getattr(torch, dtype))
    found = as_array(values)
    assert found.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(found.astype(np.int64), np.arange(35).reshape(5, 7))
    with pytest.raises(TypeError, match="x: the array on the device is not C-contiguous"):
        as_array(values.T)


def test_an_address_of_the_host_is_refused() -> None:
    host = np.ones(4, np.float32)

    class Wrong:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (4,), "typestr": "<f4", "data": (host.ctypes.data, False), "version": 3, "strides": None
        }  # fmt: skip

    with pytest.raises(ql.CudaError, match="x: the array lies on a CUDA device and cannot be read"):
        as_array(Wrong())
