"""How much the embeddings of a run's prompts will take, before any prompt is encoded."""

from __future__ import annotations

from alignprop_cli.config.schema import Config
from alignprop_cli.models import embeddings
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning.request import dtype_on
from alignprop_cli.prompts import count_prompts


def count(config: Config, device_type: str) -> tuple[int, int]:
    """Return the number of different prompts of a run, at the most, and the bytes of each.

    Args:
        config: The complete configuration.
        device_type: Device that it will run on: `cuda` or `cpu`.

    Raises:
        AssetError, ConfigError: As `meta_model` and `count_prompts`.
    """
    model = meta_model(config.model, dtype_on(config.model.dtype, device_type))
    text = model.conditioning.text
    each = sum(tensor.numel() * tensor.element_size() for tensor in text.tensors.values())
    # The negative prompt is one more.
    return count_prompts((config.train.prompts, config.eval.prompts)) + 1, each


def describe(prompts: int, each: int) -> str:
    """Return a line about them: how many, how much, and what of it goes to disk."""
    total, held = prompts * each, embeddings.budget()
    text = f"embeddings: up to {prompts} prompts of {each / 1e6:.2f} MB, {total / 2**30:.2f} GiB"
    if total <= held:
        return f"{text} of RAM"
    return (
        f"{text}: {held / 2**30:.2f} in RAM and the others in a temporary file in "
        f"{embeddings.folder()}, in each process"
    )
