"""The one digest of this package: BLAKE2b of 16 bytes, written as 32 hexadecimal digits.

Caches, stores and checkpoints hold such digests to know what they were made from. They are compared, never reversed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def new_digest(data: bytes = b"") -> hashlib.blake2b:
    """Return a digest to which more bytes are added with `update`; `hexdigest` ends it."""
    return hashlib.blake2b(data, digest_size=16)


def digest_bytes(data: bytes) -> str:
    """Digest bytes."""
    return new_digest(data).hexdigest()


def digest_text(text: str) -> str:
    """Digest a text as UTF-8; it may hold surrogates, as names of files that are not UTF-8 do."""
    return digest_bytes(text.encode(errors="surrogatepass"))


def digest_json(content: Any) -> str:
    """Digest what JSON can hold; the order of a dictionary's keys does not matter."""
    return digest_text(json.dumps(content, sort_keys=True))


def digest_file(path: Path) -> str:
    """Digest the content of a file, which is never held whole.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest tensors with their names and shapes; the order of the mapping does not matter.

    Floating point numbers are taken as float16, so that weights saved in half precision are still the same weights.
    """
    digest = new_digest()
    for name, value in sorted(tensors.items()):
        value = value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype)
        digest.update(f"{name} {tuple(value.shape)}".encode())
        numbers = value.flatten().clone(
            memory_format=torch.contiguous_format
        )  # an expanded tensor has no bytes to view
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()
