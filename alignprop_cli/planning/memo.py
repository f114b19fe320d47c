"""What operators return on the meta device, computed once for each kind of input.

There most operators are torch's Python references, which take a quarter of a millisecond to find a
shape. A network repeats the same few hundred kinds of call thousands of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

# By operator and inputs: what it returned, as `_described`; None where that cannot be made again.
_RETURNED: dict[Any, Any] = {}

# Stand for the first argument, which operators that work in place return, and for None, which there
# is in place of gradients that nobody asked for.
_FIRST, _NONE = "first argument", "none"

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator; on the meta device make what it has returned for such inputs before.

    Args:
        func: An overload of an operator.
        args: Its arguments.
        kwargs: Its named arguments.
    """
    key = None if func.is_view else _key(func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if key not in _RETURNED:
        result = func(*args, **kwargs)
        # Unless the operator has changed the shape of its input.
        if key == _key(func, args, kwargs):
            _RETURNED[key] = _described(result, args, kwargs)
        return result
    described = _RETURNED[key]
    return func(*args, **kwargs) if described is None else _made(described, args)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(cast(list[Any], value))


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the shapes of the result depend on; None where there is more than we know."""
    try:
        return func, _kind(args), tuple((name, _kind(kwargs[name])) for name in sorted(kwargs))
    except TypeError:
        return None


def _kind(value: Any) -> Any:
    """Return what a result depends on of an argument.

    Raises:
        TypeError: If that is not known, or it is a tensor with values.
    """
    if isinstance(value, Tensor):
        if value.device.type != "meta" or type(value) not in (Tensor, torch.nn.Parameter):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_kind(each) for each in cast(list[Any], value))
    if isinstance(value, (*_PLAIN, torch.memory_format)):
        # With its type: 1, 1.0 and True are equal, and give results of different types.
        return type(value), value
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
