"""What is remembered of operators on the meta device is what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_cli.planning import memo, meter

_ATEN = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def kinds(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [kinds(each) for each in result]
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype, result.device.type
    return result


CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "product": (_ATEN.mm.default, lambda: (empty(3, 4), empty(4, 5))),
    "transposed": (_ATEN.clone.default, lambda: (empty(3, 4).t(),)),
    "mixed": (_ATEN.add.Tensor, lambda: (empty(3, 1), empty(1, 4, dtype=torch.float64))),
    "several": (_ATEN.native_layer_norm.default, lambda: (empty(2, 8), [8], None, None, 1e-5)),
    "with gaps": (
        _ATEN.native_group_norm_backward.default,
        lambda: (
            *(empty(2, 8, 4), empty(2, 8, 4), empty(2, 4), empty(2, 4), empty(8)),
            *(2, 8, 4, 4, [True, False, False]),
        ),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_remembered_result_is_of_the_same_kind_and_has_its_own_memory(name: str) -> None:
    func, arguments = CALLS[name]
    args = arguments()
    expected = kinds(func(*args))
    first, second, third = (memo.call(func, args, {})[0] for _ in range(3))
    assert kinds(first) == kinds(second) == kinds(third) == expected
    one, other = (each[0] if isinstance(each, tuple) else each for each in (second, third))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_of_equal_numbers_each_has_its_own_result() -> None:
    results = [
        memo.call(_ATEN.mul.Scalar, (empty(2, dtype=torch.int64), n), {})[0] for n in (2, 2.0)
    ]
    assert [result.dtype for result in results * 2] == [torch.int64, torch.float32] * 2
    again = memo.call(_ATEN.mul.Scalar, (empty(2, dtype=torch.int64), 2.0), {})[0]
    assert again.dtype == torch.float32


def test_in_place_it_is_the_input_and_what_changes_its_shape_is_done_every_time() -> None:
    for _ in range(2):
        into = empty(3, 4)
        assert memo.call(_ATEN.add_.Tensor, (into, empty(3, 4)), {})[0] is into
        turned = empty(3, 4)
        memo.call(_ATEN.t_.default, (turned,), {})
        assert turned.shape == (4, 3)


def test_values_are_computed_every_time() -> None:
    for number in (1.0, 2.0):
        given = torch.full((2,), number)
        assert memo.call(_ATEN.mul.Tensor, (given, given), {})[0].tolist() == [number**2] * 2


def test_views_and_wrong_shapes_are_those_of_the_operator() -> None:
    for _ in range(2):
        given = empty(3, 4)
        view = memo.call(_ATEN.transpose.int, (given, 0, 1), {})[0]
        assert view.untyped_storage()._cdata == given.untyped_storage()._cdata
        with pytest.raises(RuntimeError, match="same reduction dim"):
            memo.call(_ATEN.mm.default, (empty(3, 4), empty(5, 6)), {})


def test_operations_are_those_of_the_formula_also_of_one_that_came_later() -> None:
    asked: list[Any] = []

    def formula(first: Tensor, second: Tensor, *, out_val: Tensor) -> int:
        asked.append(out_val.shape)
        return 2 * first.shape[0] * first.shape[1] * second.shape[1]

    def product(rows: int, formula: Callable[..., int] | None) -> int:
        given = empty(rows, 7).t().contiguous().t()  # no other test has such strides
        return memo.call(_ATEN.mm.default, (given, empty(7, 2)), {}, formula)[1]

    assert [product(3, each) for each in (None, formula, formula)] == [0, 84, 84]
    assert [product(4, each) for each in (formula, formula)] == [112, 112]
    assert asked == [(3, 2), (4, 2)]
    # With values nothing is remembered.
    for _ in range(2):
        values = torch.ones(3, 7), torch.ones(7, 2)
        assert memo.call(_ATEN.mm.default, values, {}, formula)[1] == 84
    assert len(asked) == 4


def unremembered(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], formula: Any
) -> tuple[Any, int]:
    result = func(*args, **kwargs)
    return result, 0 if formula is None else formula(*args, **kwargs, out_val=result)


def test_counts_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    network.train()

    def counted() -> meter.Cost:
        given = empty(2, 5, 16).requires_grad_()
        return meter.count(lambda: network(given).square(), exclude=[*network.parameters(), given])

    with monkeypatch.context() as patch:
        patch.setattr(memo, "call", unremembered)
        plain = counted()
    assert plain.forward_flops > 0
    assert plain.saved > 0
    assert counted() == counted() == plain
