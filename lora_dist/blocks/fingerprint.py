"""Fingerprint of a base: a digest of names, shapes, dtypes and contents of its source tensors.

Fed chunk by chunk as the tensors are read from disk, so that precision, quantisation, storage and the number of processes do not
change it (design section 4). The reading is `models/`' business; this only hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


class Fingerprint:
    """Order-free digest of named tensors. Feed each tensor once, then read `hexdigest()`."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: Sequence[int], chunks: Iterable[bytes | memoryview]) -> None:
        """Add one tensor.

        Args:
            name: its name in the file.
            dtype, shape: as the file states them.
            chunks: its bytes, in order.

        Raises:
            ValueError: if the name was added before.
        """
        if name in self._tensors:
            raise ValueError(f"tensor {name} is in the model twice")
        hasher = hashlib.sha256(f"{name} {dtype} {'x'.join(map(str, shape))}\n".encode())
        for chunk in chunks:
            hasher.update(chunk)
        self._tensors[name] = hasher.hexdigest()

    def hexdigest(self) -> str:
        hasher = hashlib.sha256()
        for name in sorted(self._tensors):
            hasher.update(f"{name} {self._tensors[name]}\n".encode())
        return hasher.hexdigest()
