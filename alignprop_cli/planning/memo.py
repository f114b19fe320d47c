"""What operators return on the meta device and how much they do, once for each kind of input.

There most operators are torch's Python references, which take a quarter of a millisecond to find a
shape, and torch's formulas for operations take as long. A network repeats the same few hundred
kinds of call thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

# By formula, operator and inputs: what it returned, as `_described` (None where that cannot be made
# again), and its operations.
_KNOWN: dict[Any, tuple[Any, int]] = {}

# Stand for the first argument, which operators that work in place return, and for None, which there
# is in place of gradients that nobody asked for.
_FIRST, _NONE = "first argument", "none"

_TENSORS = {Tensor, torch.nn.Parameter}
_PLAIN = {
    *(int, float, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}


def call(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    formula: Callable[..., int] | None = None,
) -> tuple[Any, int]:
    """Call an operator; on the meta device make what it has returned for such inputs before.

    Args:
        func: An overload of an operator.
        args: Its arguments.
        kwargs: Its named arguments.
        formula: Its operations, from its arguments and `out_val`, its result; None counts none.

    Returns:
        Its result and its operations.
    """
    key = None if func.is_view else _key(formula, func, args, kwargs)
    described, flops = _KNOWN.get(key, (None, None))
    if described is not None and flops is not None:
        return _made(described, args), flops
    result = func(*args, **kwargs)
    if flops is None:
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        # Unless the operator has changed the shape of its input.
        if key is not None and key == _key(formula, func, args, kwargs):
            _KNOWN[key] = _described(result, args, kwargs), flops
    return result, flops


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(cast(list[Any], value))


def _key(formula: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what shapes and operations depend on; None where there is more than we know."""
    try:
        return (
            formula,
            func,
            _kind(args),
            tuple((name, _kind(kwargs[name])) for name in sorted(kwargs)),
        )
    except TypeError:
        return None


def _kind(value: Any) -> Any:
    """Return what a result depends on of an argument.

    Raises:
        TypeError: If that is not known, or it is a tensor with values.
    """
    kind = type(value)
    if kind in _TENSORS and value.is_meta:
        return value.shape, value.stride(), value.dtype
    if kind in _PLAIN:
        # With its type: 1, 1.0 and True are equal, and give results of different types.
        return kind, value
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, cast(list[Any], value)))
    raise TypeError


def _described(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return how to make such a result again; None where it is a view, or not only tensors."""
    if isinstance(result, (list, tuple)):
        parts = [_described(each, args, kwargs) for each in cast(list[Any], result)]
        return None if None in parts or _FIRST in parts else tuple(parts)
    if result is None:
        return _NONE
    if not isinstance(result, Tensor):
        return None
    if args and result is args[0]:
        return _FIRST
    storage, inputs = result.untyped_storage(), tensors((*args, *kwargs.values()))
    shares = any(storage._cdata == each.untyped_storage()._cdata for each in inputs)
    described = result.shape, result.stride(), result.dtype
    whole = _empty(described).untyped_storage().nbytes() == storage.nbytes()
    return described if whole and not shares and result.device.type == "meta" else None


def _made(described: Any, args: tuple[Any, ...]) -> Any:
    if described is _FIRST:
        return args[0]
    if described is _NONE:
        return None
    if isinstance(described[0], torch.Size):
        return _empty(described)
    return tuple(_made(each, args) for each in described)


def _empty(described: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
    shape, stride, dtype = described
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
