"""Arrays that come in: NumPy, ml_dtypes' bfloat16, anything with __dlpack__ (PyTorch, JAX, …) in host memory, and
anything with __cuda_array_interface__ on a GPU, which is copied to the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from quantlab import _core, cuda


class DLPackArray(Protocol):
    """An array of any library that has DLPack: of NumPy, PyTorch, JAX."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


_DLPACK_CPU = (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost: memory that the processor reads


def as_array(value: Any, name: str = "x") -> np.ndarray:
    """`value` as a NumPy array without a copy where it has a buffer in host memory; bfloat16 comes as
    ml_dtypes.bfloat16.

    Raises quantlab.CudaError for an array on a device that cannot be read, TypeError for what is no array."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__cuda_array_interface__"):
        return _from_cuda(value, name)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, name)
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        return np.asarray(value)
    raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy array or an object with __dlpack__")


def _from_cuda(value: Any, name: str) -> np.ndarray:
    """A copy on the host of a C-contiguous array on a CUDA device."""
    described = value.__cuda_array_interface__
    kind = described["typestr"]
    if "bfloat16" in str(getattr(value, "dtype", "")):
        import ml_dtypes

        kind = ml_dtypes.bfloat16
    if described.get("strides") is not None:
        raise TypeError(f"{name}: the array on the device is not C-contiguous")
    if not cuda.usable():
        raise _core.CudaError(f"{name}: the array lies on a CUDA device, and CUDA cannot be used: {cuda.why_not()}")
    out = np.empty(described["shape"], kind)
    try:
        _core.cuda_fetch(out.reshape(-1).view(np.uint8), described["data"][0])
    except _core.CudaError as error:
        raise _core.CudaError(f"{name}: the array lies on a CUDA device and cannot be read: {error}") from None
    return out


def _from_dlpack(value: Any, name: str) -> np.ndarray:
    device = value.__dlpack_device__()
    if device[0] not in _DLPACK_CPU:
        raise _core.CudaError(
            f"{name}: the array lies on device {tuple(map(int, device))}, expected one in host memory"
        )
    try:
        if "bfloat16" in str(getattr(value, "dtype", "")):
            return _bfloat16_from_dlpack(value.__dlpack__())
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as refusal:
        raise TypeError(f"{name}: NumPy cannot take this {type(value).__name__}: {refusal}") from None


def _bfloat16_from_dlpack(capsule: Any) -> np.ndarray:
    """NumPy knows no bfloat16 in DLPack: reads the description in the capsule, and keeps the capsule alive."""
    import ctypes

    import ml_dtypes

    class Tensor(ctypes.Structure):  # DLTensor of dlpack.h
        _fields_ = (
            ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
        )  # fmt: skip

    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = Tensor.from_address(get_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    strides = tuple(2 * tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    extent = 2 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if strides else None
    memory = (ctypes.c_char * (extent or 2 * int(np.prod(shape)))).from_address(tensor.data + tensor.byte_offset)
    memory.capsule = capsule  # type: ignore[attr-defined]  # the tensor's memory lives as long as an array over it
    return np.ndarray(shape, ml_dtypes.bfloat16, memoryview(memory), strides=strides)


def as_float32(value: Any, name: str = "x", ndim: int | None = None) -> np.ndarray:
    """`value` as a C-contiguous float32 array; a copy only where its type or layout asks for one."""
    array = as_array(value, name)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {array.dtype}, expected floating-point numbers")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name}: got shape {array.shape}, expected {ndim} dimensions")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which is then refused by name
        return np.asarray(array, np.float32, order="C")
