"""CUDA: what is there, and why not."""

from __future__ import annotations


def built() -> bool:
    """Whether this build of `quantlab._core` holds CUDA kernels."""
    return False


def usable() -> bool:
    """Whether `device="cuda"` works here."""
    return False


def why_not() -> str:
    """Why CUDA cannot be used; "" where it can."""
    return "this build holds no CUDA kernels"
