"""Switch the compiled blocks of a network off, for good or for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
