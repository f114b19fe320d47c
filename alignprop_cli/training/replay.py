"""Replay the network calls of the roll-out from a recording, which is a CUDA graph.

On a fast GPU a call with few images takes as long as Python needs to launch its 1,500 kernels. A
recording is launched at once. It reads its inputs from fixed places and writes its output to one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alignprop_cli.errors import first_line
from alignprop_cli.lora import layers as lora

P = ParamSpec("P")
R = TypeVar("R")

# Shapes that are recorded: of a roll-out batch of which some images have stopped, and of calls with
# and without guidance. Others are called as usual.
_MOST = 4


class Recording(Protocol):
    """A recorded call."""

    output: Any
    """What the call returned; `replay` writes new values into its tensors."""

    def replay(self) -> None:
        """Compute the output again, from what is in the inputs' memory now."""
        ...


Record = Callable[[Callable[[], Any]], Recording]
"""Makes a call and records it."""


class CudaRecording:
    """A call as a CUDA graph; see `Recording`.

    Args:
        call: Makes the call; must not read values back from the GPU.
        pool: The memory in which it works, which several recordings can share as long as one runs
            after the other.
    """

    def __init__(self, call: Callable[[], Any], pool: Any = None) -> None:
        # Libraries set themselves up in the first calls, which a graph cannot contain. They run on
        # a stream of their own, as the graph will be.
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        here.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.output = call()

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


def cuda_recorder() -> Record:
    """Return a function that records calls on the current GPU, all in the same memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda call: CudaRecording(call, pool)


@dataclass(frozen=True)
class _Recorded:
    """A recording and the places that it reads its inputs from."""

    inputs: list[Tensor]
    recording: Recording


class Replay:
    """Records the network's calls inside a function, and replays them from then on.

    With gradient, and until `start`, everything is called as usual. The kernels are the same, so
    the values are.

    Args:
        network: Its `forward` is replaced meanwhile.
        note: Called with messages for people.

    Attributes:
        held_bytes: What the recordings are estimated to hold, for as long as there are any.
    """

    def __init__(self, network: torch.nn.Module, note: Callable[[str], object]) -> None:
        self._network, self._note = network, note
        self._record: Record | None = None
        self._recorded: dict[Hashable, _Recorded] = {}
        self._addresses: tuple[int, ...] = ()
        self._forward: Any = None
        self.held_bytes = 0

    @property
    def is_on(self) -> bool:
        """Return whether calls are recorded and replayed."""
        return self._record is not None

    @property
    def recordings(self) -> int:
        """Return the number of recordings there are."""
        return len(self._recorded)

    def start(self, record: Record) -> None:
        """Record calls from now on."""
        self.stop()
        self._record = record

    def stop(self) -> None:
        """Make all calls as usual from now on, and free what was recorded."""
        self._record = None
        self.held_bytes = 0
        self.forget()

    def forget(self) -> None:
        """Record everything anew, as after a change of the network's code or memory."""
        self._recorded.clear()

    def around(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return a function that makes the same call and replays the network's.

        For as long as the network and its LoRA stay in the same memory.
        """
        if self._record is None:
            return call
        addresses = lora.addresses(self._network)
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses

        def replayed(*arguments: P.args, **options: P.kwargs) -> R:
            self._forward = self._network.forward
            self._network.forward = self._call
            try:
                return call(*arguments, **options)
            finally:
                # The attribute hides the method of the class.
                del self._network.forward

        return replayed

    def _call(self, *arguments: Any, **options: Any) -> Any:
        if self._record is None or torch.is_grad_enabled():
            return self._forward(*arguments, **options)
        leaves, structure = pytree.tree_flatten((arguments, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # What is no tensor is part of the recording.
        shapes = [_shape(x) if isinstance(x, Tensor) else x for x in leaves]
        key = (str(structure), *shapes)
        found = self._recorded.get(key)
        if found is None and len(self._recorded) < _MOST:
            found = self._recorded_anew(key, leaves, structure)
        if found is None:
            return self._forward(*arguments, **options)
        for place, tensor in zip(found.inputs, tensors, strict=True):
            place.copy_(tensor)
        found.recording.replay()
        # A copy: the next replay writes over it.
        return pytree.tree_map_only(Tensor, torch.clone, found.recording.output)

    def _recorded_anew(
        self, key: Hashable, leaves: list[Any], structure: pytree.TreeSpec
    ) -> _Recorded | None:
        """Record a call and return it; None, and no recordings any more, where that fails."""
        assert self._record is not None
        fixed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments, options = pytree.tree_unflatten(fixed, structure)
        forward = self._forward
        try:
            made = self._record(lambda: forward(*arguments, **options))
        except RuntimeError as error:
            self.stop()
            self._note(
                f"the roll-out's calls cannot be recorded and run as usual: {first_line(error)}"
            )
            return None
        inputs = [leaf for leaf in fixed if isinstance(leaf, Tensor)]
        self._recorded[key] = _Recorded(inputs, made)
        return self._recorded[key]


def _shape(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
