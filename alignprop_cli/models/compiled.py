"""Networks whose repeated blocks are compiled: taken back, or passed over for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled(network: torch.nn.Module) -> Iterator[None]:
    """Run the network uncompiled inside the block: other batch sizes, for a short time."""
    compiled = {m: m._compiled_call_impl for m in network.modules() if m._compiled_call_impl}
    take_back(network)
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def take_back(network: torch.nn.Module) -> None:
    """Let all modules run uncompiled again."""
    for module in network.modules():
        module._compiled_call_impl = None
