"""What the sections of a configuration share: how they read values, and types with their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Text = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys."""

    # Frozen, so that a run does what is printed and stored with it. Infinity and NaN are valid
    # YAML, but never what a user means.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `steps: true` as one step.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("expected no true or false here")
        return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys at which two nested mappings differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        # Sections are compared key by key; a missing value counts as None.
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = differences(cast(Mapping[str, Any], before), cast(Mapping[str, Any], after))
            found |= {f"{key}.{name}": values for name, values in inner.items()}
        elif before != after:
            found[key] = (before, after)
    return found
