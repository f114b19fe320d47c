"""Write tensors to a safetensors file, and hash them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as serialise
from torch import Tensor


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing but its content.

    Args:
        file: Replaced if it exists.
        tensors: By name, contiguous, no two of which share memory.
        metadata: Texts for the header.

    Raises:
        OSError: From the operating system.
    """
    # safetensors orders the texts of the header at random, and everything else always alike. So the
    # header is written again: its length in 8 bytes, JSON, blanks up to a multiple of 8 bytes.
    # Source: https://github.com/huggingface/safetensors, "Format".
    data = serialise(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    # Offsets count from the end of the header, so its length is free.
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.write(memoryview(data)[end:])


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of all that a safetensors file has after its header.

    Args:
        tensors: As in `save_tensors`.
    """
    # safetensors orders tensors by precision and name, so the header's texts change nothing here.
    data = serialise(dict(tensors))
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
