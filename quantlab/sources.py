"""Which sources the C core was built from: beside those of a development tree, a core of others is refused."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def fingerprint(root: Path) -> str:
    """SHA-256, 16 digits of it, over what the core and the Python layer must agree on: csrc's headers and binding.
    setup.py builds it into the core as `_core.sources`."""
    digest = sha256()
    for path in sorted([*root.glob("csrc/**/*.h"), *root.glob("csrc/python/*.c")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check(core: object, package: str) -> None:
    """ImportError where the package lies in a source tree that the core was not built from; an installed one does
    not."""
    root = Path(package).parent
    if (root / "csrc/python/module.c").is_file() and getattr(core, "sources", None) != fingerprint(root):
        raise ImportError(
            f"the C core was built from other sources than those in {root / 'csrc'}. Build it again: pip install -e ."
        )
