"""Count the bytes and the floating point operations of a piece of work, on any device.

On the meta device tensors have shapes and no values. Running a network there shows, in about a
second and without a GPU, which tensors autograd saves for backward, how many bytes live at the same
time, and how many operations it takes. The same functions count a real run, which is how the tests
compare the prediction with reality.

Of torch's own tools (2.14), FlopCounterMode counts no bytes and has no formula for the CPU's
attention kernel, and MemTracker counts neither operations nor what autograd keeps between forward
and backward. Neither makes the meta device take the attention kernel of the real device. Where
torch has a formula for operations, it is used here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from alignprop_cli.planning import memo

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one piece of work, forward and backward.

    Args:
        saved: Bytes of the tensors that autograd saves between forward and backward.
        forward: Peak of the bytes allocated in forward; contains `saved`.
        backward: Peak of the bytes in backward, recomputation included; contains `saved`.
        forward_flops: Floating point operations of forward; a multiply-add counts as two.
        backward_flops: Floating point operations of backward, recomputation included.
        forward_launches: Operators of forward that start work on a device; views start none.
        backward_launches: The same of backward.
    """

    saved: int
    forward: int
    backward: int
    forward_flops: int
    backward_flops: int
    forward_launches: int = 0
    backward_launches: int = 0


class SavedBytes:
    """Counts the bytes that autograd saves inside the block; each storage once.

    Args:
        exclude: Tensors that exist anyway and are not counted: weights, inputs.
        hold: Keep what was saved until `release`; otherwise what autograd lets go is not counted.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), *, hold: bool = True) -> None:
        self._excluded = {_storage(tensor) for tensor in exclude}
        self._hold = hold
        self._seen: dict[int, tuple[int, Any]] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def total(self) -> int:
        """Return the bytes saved so far."""
        return sum(size for size, _ in self._seen.values())

    def release(self) -> None:
        """Let the saved tensors go; `total` is 0 afterwards."""
        self._seen.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        number = _storage(tensor)
        if number not in self._excluded and number not in self._seen:
            storage = tensor.untyped_storage()
            self._seen[number] = (storage.nbytes(), storage if self._hold else None)
            # The number is an address: a freed storage's may be given to another one.
            if not self._hold:
                weakref.finalize(storage, self._seen.pop, number, None)
        # Detached: an output saved by its own node would keep that node, and so itself, alive.
        return tensor.detach()


class Meter(TorchDispatchMode):
    """Follows the bytes allocated inside the block, and counts floating point operations.

    Attributes:
        now: Bytes that are alive.
        peak: The largest value of `now` so far.
        flops: Operations by torch's own formulas; a multiply-add counts as two.
        launches: Operators that start work on a device: all but views and empty allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self.launches = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        # 1. The formula, looked up at every call: custom operators may register theirs later.
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None and func not in _WHOLE:
            # Without autograd a composite operator arrives whole. Taken apart, its pieces come here
            # again and have formulas.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _WHOLE.add(func)
        # 2. The operator itself. Views and in-place results share a storage with an input and are
        #    no new memory.
        inputs = {_storage(tensor) for tensor in memo.tensors((*args, *kwargs.values()))}
        result, flops = memo.call(func, args, kwargs, formula)
        self.flops += flops
        self.launches += not (func.is_view or packet in _NO_WORK)
        for tensor in memo.tensors((result,)):
            self._add(tensor, inputs)
        return result

    def _add(self, tensor: Tensor, inputs: set[int]) -> None:
        number = _storage(tensor)
        if number in self._known or number in inputs:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known[number] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        # The end of the storage, not of the tensor: several tensors may share it.
        weakref.finalize(storage, self._remove, number)

    def _remove(self, number: int) -> None:
        self.now -= self._known.pop(number, 0)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Any] = {
    # Torch has no formula for the CPU's attention kernel.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# Operators that are no composites of others.
_WHOLE: set[Any] = set()

# Operators without a kernel, besides views.
_NO_WORK = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.detach, _ATEN._unsafe_view}


@contextmanager
def fused_attention(device_type: str) -> Iterator[None]:
    """Make attention on the meta device use the fused kernel of the real device.

    On the meta device torch falls back to the plain formula and saves the whole attention matrix.

    Args:
        device_type: `cuda` or `cpu`: the device whose kernel is used.
    """
    # The function itself is replaced: a TorchFunctionMode would be off during recomputation, which
    # runs in backward.
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *args, **kwargs)
        causal = bool(kwargs.get("is_causal", False))
        if device_type == "cuda":
            # Arguments: no mask; the logsumexp is wanted, which backward needs.
            kernel = _ATEN._scaled_dot_product_efficient_attention
            return kernel(query, key, value, None, True, is_causal=causal)[0]
        kernel = _ATEN._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, is_causal=causal)[0]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def count(
    run: Callable[[], Tensor],
    *,
    exclude: Iterable[Tensor] = (),
    device_type: str = "cpu",
    times: Mapping[nn.Module, int] | None = None,
) -> Cost:
    """Count one piece of work, forward and, where its result carries gradient, backward.

    Args:
        run: The work; called once, and its result differentiated.
        exclude: Tensors that exist anyway and are not counted: weights, inputs.
        device_type: Device whose attention kernel is counted where the work is on the meta device.
        times: Modules in the order of their calls, and how many times each counts (see `repeats`):
            what is done from its call to the next one's, and the same of backward.
    """
    excluded = list(exclude)
    with fused_attention(device_type):
        with Meter() as meter, SavedBytes(excluded, hold=False) as kept:
            tally = _Tally(meter, kept)
            with tally.forward_of(times or {}):
                result = run()
        tally.cut()
        saved, forward, forward_flops = tally.saved, tally.peak, tally.flops
        forward_launches = tally.launches
        tally.begin_backward()
        if result.requires_grad:
            with meter:
                result.backward(torch.empty_like(result))
        tally.cut()
    # Gradients of weights and input were counted, and must not stay for the next count.
    for tensor in excluded:
        tensor.grad = None
    return Cost(
        saved,
        forward,
        tally.peak,
        forward_flops,
        tally.flops,
        forward_launches,
        tally.launches,
    )


class _Tally:
    """Adds up the stretches of forward or backward, of which some count several times.

    Attributes:
        now, peak, saved, flops, launches: As in `Meter` and `SavedBytes`, of all stretches so far.
    """

    def __init__(self, meter: Meter, kept: SavedBytes) -> None:
        self.now = self.peak = self.saved = self.flops = self.launches = 0
        self._meter, self._kept = meter, kept
        self._times, self._begun, self._saved = 1, meter.now, 0

    def cut(self, times: int = 1) -> None:
        """End a stretch, and begin one that counts as many times."""
        meter, again = self._meter, self._times - 1
        # What lives on after a stretch is there when it is run again.
        change, peak = meter.now - self._begun, meter.peak - self._begun
        self.peak = max(self.peak, self.now + peak + max(0, again * change))
        self.now += self._times * change
        self.saved += self._times * (self._kept.total - self._saved)
        self.flops += self._times * meter.flops
        self.launches += self._times * meter.launches
        meter.peak, meter.flops, meter.launches = meter.now, 0, 0
        self._times, self._begun, self._saved = times, meter.now, self._kept.total

    def begin_backward(self) -> None:
        """Count from here on what backward does, beside what is alive."""
        self.now += self._meter.now - self._begun
        self.peak, self.saved, self.flops, self.launches = self.now, 0, 0, 0
        self._begun = self._meter.peak = self._meter.now

    @contextmanager
    def forward_of(self, times: Mapping[nn.Module, int]) -> Iterator[None]:
        """Cut where these modules are called inside the block, and where backward leaves them."""
        before = 1  # how many times what is called now counts, until the next module's call

        def called(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
            nonlocal before
            self.cut(times[module])
            # The first of its inputs that has its gradient: what was called before comes next. Not
            # the gradient of its result, which a module that is recomputed has none of here.
            hook = _once(partial(self.cut, before))
            for tensor in memo.tensors((*arguments, *options.values())):
                if tensor.requires_grad:
                    tensor.register_hook(hook)
            before = times[module]

        hooks = [m.register_forward_pre_hook(called, with_kwargs=True) for m in times]
        try:
            yield
        finally:
            # Before backward, which runs the modules again that are recomputed.
            for each in hooks:
                each.remove()


def _once(run: Callable[[], None]) -> Callable[[Tensor], None]:
    """Return a hook of a gradient that runs something when it is called first."""
    waiting = [run]
    return lambda _: waiting.pop()() if waiting else None


def _storage(tensor: Tensor) -> int:
    # The address of the storage; data_ptr() is 0 for every tensor on the meta device.
    return tensor.untyped_storage()._cdata
