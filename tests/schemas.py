"""The JSON objects that `--json` prints, as types; `python -m tests.schemas` writes docs/schemas/.

Nothing else may be in an object: a new key is added here, and one that changes its meaning gets a
new number in `schema`.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import (  # Python 3.11 has an older one
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    get_type_hints,
)

from pydantic import ConfigDict, Field, TypeAdapter, create_model, with_config
from typing_extensions import TypedDict

from alignprop_cli.config.schema import Config
from alignprop_cli.evaluation.compare import Identity, Paired
from alignprop_cli.planning.estimate import Budget
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.speed import Times
from alignprop_cli.publishing.request import Kind

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"

# Also of what is not finite, which JSON cannot say.
Number = float | None
Place = Annotated[str, Field(description="An absolute path.")]
Exports = Annotated[
    dict[Kind, Place],
    Field(description="With `--export`: by its kind, a file or the folder of `merged`."),
]
Hub = Annotated[str, Field(description="With `--push-to-hub`: the address of the repository.")]
closed = with_config(ConfigDict(extra="forbid"))


def strict(kind: type) -> Any:
    """Return a dataclass as a model without room for other keys, all of them required."""
    hints = get_type_hints(kind)
    found = {f.name: (_plain(hints[f.name]), ...) for f in fields(kind)}
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **found)


def _plain(hint: Any) -> Any:
    """Return a type as `--json` prints it: dataclasses inside are strict too."""
    if is_dataclass(hint):
        return strict(hint)  # type: ignore[arg-type]
    if getattr(hint, "__args__", None) and any(map(is_dataclass, hint.__args__)):
        inside = [_plain(each) for each in hint.__args__]
        return inside[0] if len(inside) == 1 else inside[0] | inside[1]
    return Number if hint is float else hint


@closed
class Presets(TypedDict):
    """`train --list-presets`."""

    schema: Literal["alignprop.presets/1"]
    presets: Annotated[dict[str, str], Field(description="What each preset does, by its name.")]


@closed
class Shown(TypedDict):
    """`train --show-preset`."""

    schema: Literal["alignprop.config/1"]
    config: Config


PlanShown = create_model(
    "PlanShown",
    __base__=strict(Plan),
    accumulation=(int, Field(description="Micro-batches of a step in one process, at most.")),
    images_per_hour=(Number, ...),
)


@closed
class Embeddings(TypedDict):
    """What the prompts take once they are encoded."""

    prompts: int
    bytes: int


@closed
class Planned(TypedDict):
    """`train --dry-run`."""

    schema: Literal["alignprop.plan/1"]
    plan: PlanShown  # type: ignore[valid-type]
    budget: strict(Budget)  # type: ignore[valid-type]
    times: strict(Times) | None  # type: ignore[valid-type]
    uncounted: Annotated[list[str], Field(description="What the estimate does not know.")]
    embeddings: Embeddings
    config: Annotated[dict[str, Any], Field(description="As in alignprop.config/1.")]


@closed
class PlannedCard(TypedDict):
    """The plan for cards of one memory."""

    plan: PlanShown | None  # type: ignore[valid-type]
    budget: strict(Budget)  # type: ignore[valid-type]
    times: strict(Times) | None  # type: ignore[valid-type]
    options: Annotated[
        str | None, Field(description="With which it is planned, as none fits without them.")
    ]


@closed
class Compared(TypedDict):
    """`train --dry-run` with several `--gpu-memory`."""

    schema: Literal["alignprop.plans/1"]
    plans: list[PlannedCard]
    uncounted: Annotated[list[str], Field(description="What the estimate does not know.")]
    embeddings: Embeddings
    config: Annotated[dict[str, Any], Field(description="As in alignprop.config/1.")]


PairedShown = strict(Paired)


@closed
class HeldOut(TypedDict):
    """Base model and adapter on held-out prompts."""

    prompts: str
    images: int
    rewards: dict[str, PairedShown]  # type: ignore[valid-type]
    checker: Annotated[
        dict[str, PairedShown],  # type: ignore[valid-type]
        Field(description="Shares of right images, by part of the prompt; empty for most prompts."),
    ]


@closed
class Guarded(TypedDict):
    """What the guard says."""

    stopped: bool
    told: str | None
    best_step: int | None
    best: Place | None


@closed
class Trained(TypedDict):
    """`train`; also `summary.json`, without `schema`."""

    schema: Literal["alignprop.train/2"]
    run: Place
    adapter: Place
    weights: Annotated[str, Field(description="`last step`, or `step N` where that is the best.")]
    ema_adapter: NotRequired[Place]
    sheet: Place
    steps: int
    images_seen: int
    seconds: float
    peak_memory_gib: float
    guard: Guarded
    next: Annotated[str, Field(description="The command that evaluates the run.")]
    held_out: HeldOut
    card: Annotated[Place, Field(description="The model card beside the adapter.")]
    exports: NotRequired[Exports]
    hub: NotRequired[Hub]


@closed
class Model(TypedDict):
    """The base model."""

    id: str
    fingerprint: str


# The same keys but for those of the comparison, which the base model does not have.
MetricShown = create_model(
    "Metric",
    __config__=ConfigDict(extra="forbid"),
    mean=(Number, ...),
    std=(Number, ...),
    **{f.name: (Number, Field(default=None)) for f in fields(Paired)},
)
Metrics = Annotated[
    dict[str, dict[str, bool | MetricShown]],  # type: ignore[valid-type]
    Field(description="By metric: `trained_on`, and mean and deviation by model (base, ...)."),
]


@closed
class ByPrompt(TypedDict):
    """The mean rewards of one prompt, by model and reward."""

    prompt: str
    images: int
    rewards: dict[str, dict[str, Number]]


@closed
class SampleShown(TypedDict):
    """One image of every model, and its rewards by model and reward."""

    number: int
    prompt: str
    prompt_index: int
    image_index: int
    group: str | None
    rewards: dict[str, dict[str, Number]]


@closed
class Evaluated(TypedDict):
    """`evaluate`, `soup --evaluate` and `--sweep`; `results.json` lacks what is after `samples`."""

    schema: Literal["alignprop.evaluate/4"]
    version: str
    model: Model
    adapters: dict[str, strict(Identity)]  # type: ignore[valid-type]
    prompts: str
    prompt_files: Annotated[
        dict[str, str], Field(description="SHA-256 of each file of a set that is not built in.")
    ]
    seed: int
    sample: Annotated[dict[str, Any], Field(description="The section `sample`.")]
    images: int
    rewards: Metrics
    groups: dict[str, Metrics]
    checker: Metrics
    seconds: float
    by_prompt: list[ByPrompt]
    samples: list[SampleShown]
    output: NotRequired[Place]
    sheet: NotRequired[Place]
    report: NotRequired[Place]
    layout: NotRequired[
        Annotated[Place, Field(description="With `--layout`: the folders of the scorer.")]
    ]
    exports: NotRequired[Exports]
    hub: NotRequired[Hub]


@closed
class Mixed(TypedDict):
    """One member of a mix; of the base model there is no hash."""

    name: str
    sha256: str | None
    coefficient: float


@closed
class Souped(TypedDict):
    """`soup`."""

    schema: Literal["alignprop.soup/1"]
    folder: Place
    adapter: Place
    sha256: str
    members: list[Mixed]
    method: str
    error: Annotated[Number, Field(description="Relative error of svd; null where it is exact.")]
    layers: int
    ranks: list[int]
    bytes: int
    exports: NotRequired[Exports]
    hub: NotRequired[Hub]


@closed
class Skipped(TypedDict):
    """A file that was not measured."""

    file: str
    reason: str


@closed
class Histogram(TypedDict):
    """Counts between edges, of which there is one more."""

    edges: list[float]
    counts: list[int]


@closed
class Statistics(TypedDict):
    """One reward over all images."""

    mean: float
    std: float
    min: float
    max: float
    quantiles: Annotated[dict[str, float], Field(description="By their share, as a text.")]
    histogram: Histogram


class Row(TypedDict, total=False):
    """One image. The further keys are its rewards."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    file: Required[str]
    prompt: Required[str | None]
    prompt_source: Required[str]


@closed
class Scored(TypedDict):
    """`score`."""

    schema: Literal["alignprop.score/3"]
    scored: int
    skipped: list[Skipped]
    same_content: int
    notes: list[str]
    rewards: dict[str, Statistics]
    output: Place | None
    gallery: Place | None
    images: NotRequired[list[Row]]


PRINTED = (Presets, Shown, Planned, Compared, Trained, Evaluated, Souped, Scored)


def schemas() -> dict[str, dict[str, Any]]:
    """Return all schemas by the name of their file: alignprop.train.2.json."""
    found: dict[str, dict[str, Any]] = {}
    for kind in PRINTED:
        schema = TypeAdapter(kind).json_schema(mode="serialization")
        name = schema["properties"]["schema"]["const"]
        made = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name, **schema}
        found[f"{name.replace('/', '.')}.json"] = made
    return found


def text(schema: dict[str, Any]) -> str:
    """Return the content of its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, schema in schemas().items():
        (FOLDER / name).write_text(text(schema), encoding="utf-8")
