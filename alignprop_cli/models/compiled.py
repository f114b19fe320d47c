"""Compile the blocks of a network, and switch them off, for good or for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Besides what diffusers says that a network repeats: group norm, SiLU and the copies between memory
# layouts become fewer kernels.
_ALSO = ("ResnetBlock2D",)


def compile_blocks(network: torch.nn.Module, **options: Any) -> None:
    """Compile the blocks that the network repeats; each kind and size of them is compiled once.

    Args:
        network: Its blocks run compiled from now on.
        options: Of torch.compile.

    Raises:
        ValueError: If it has no such blocks.
    """
    names = {*(getattr(network, "_repeated_blocks", None) or ()), *_ALSO}
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError("it repeats no blocks")
    for block in blocks:
        block.compile(**options)


@contextmanager
def uncompiled(network: torch.nn.Module) -> Iterator[None]:
    """Run the network uncompiled inside the block.

    For other batch sizes than those of training, each of which would be compiled first.
    """
    # `Module.compile` keeps the compiled call in this attribute; torch has no public switch for it.
    compiled = {m: m._compiled_call_impl for m in network.modules() if m._compiled_call_impl}
    take_back(network)
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def take_back(network: torch.nn.Module) -> None:
    """Undo the compilation: all modules run uncompiled again."""
    for module in network.modules():
        module._compiled_call_impl = None
