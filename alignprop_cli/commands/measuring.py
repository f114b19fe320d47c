"""What `score` is asked: which rewards, and where their rows go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from alignprop_cli.commands.options import check_output_file, make_parent, split_names
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config, RewardConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.paths import user_path
from alignprop_cli.rewards import registry
from alignprop_cli.scoring import rows
from alignprop_cli.scoring.files import Found, drawn_by_embedded
from alignprop_cli.scoring.run import Wanted
from alignprop_cli.storage import locked

# Bytes that names of temporary files may add to that of the file, of the 255 that a name may have.
_LONGEST_NAME = 255 - 40


def rewards(sets: Sequence[str] | None, reward: Sequence[str] | None, found: list[Found]) -> Config:
    """Return a configuration of which `score` uses only the rewards.

    Args:
        sets: Texts of `--set`.
        reward: Values of `--reward`. Without any, `clip` measures images that an embedded model has
            drawn.
        found: The images.

    Raises:
        ConfigError: If `sets` has a key outside `reward` or one of training, or no reward is named.
    """
    # Other keys are about models and training, and would be ignored silently.
    for text in sets or ():
        if not text.strip().startswith("reward."):
            raise ConfigError(
                f"--set: {text[:100]}: only reward.NAME.OPTION can be set here",
                hint="for instance --set reward.clip.model=ViT-B-32",
            )
    chosen = split_names(reward, "--reward")
    unnamed = not chosen and not sets
    given = {"rewards": dict.fromkeys(chosen), "assignments": sets or ()}
    config = presets.resolve(**given, default_reward="clip", source="command line")
    for name, member in config.reward.items():
        trained = (member.model_fields_set & RewardConfig.model_fields.keys()) - {"dtype"}
        if trained:
            key = f"reward.{name}.{min(trained)}"
            raise ConfigError(f"--set: {key} is about training: no row would be another with it")
    # Looked at only where it matters: every image has to be opened for it.
    embedded = unnamed or any(registry.is_embedded(n, r.options) for n, r in config.reward.items())
    model = "tiny" if embedded and all(drawn_by_embedded(each.path) for each in found) else ""
    if unnamed and not model:
        raise ConfigError(
            "score: no reward is named, and not all images were drawn by an embedded model",
            hint=f"give --reward with one of {', '.join(registry.names())}, or file.py:attribute",
        )
    registry.check_embedded(config.reward, model)
    return config


@contextmanager
def destination(
    output: str | None,
    wanted: rows.Format | None,
    *,
    gallery: bool,
    top: int | None,
    as_json: bool,
    overwrite: bool,
    resume: bool,
    workers: int | None,
) -> Iterator[Wanted]:
    """Yield what to do with the measurements; while the block runs, no other process writes there.

    Args:
        output: Value of --output.
        wanted: Value of --format.
        gallery: Whether a page is written.
        top: Value of --top.
        as_json: Whether standard output is for one JSON object.
        overwrite: Whether files may be replaced.
        resume: Whether the rows of an earlier run are kept.
        workers: Value of --workers.

    Raises:
        ConfigError: If options contradict each other, something is there, or another process is
            writing there.
    """
    target = user_path(output, "--output") if output else None
    # With --output all rows go there, and the table of the best is only shown.
    if target is None and top is not None and wanted not in (None, "table"):
        raise ConfigError(f"--top is a table, and --format {wanted} wants all rows")
    if target is not None:
        if resume and overwrite:
            raise ConfigError("--resume keeps what is there and --overwrite replaces it: give one")
        if target.is_dir():
            raise ConfigError(f"--output: {target} is a folder, expected a file")
        if len(target.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
            raise ConfigError(f"--output: {target.name[:40]}...: the name is too long")
        make_parent(target)
    lock = nullcontext()
    if target is not None:
        lock = locked(target.with_name(f".{target.name}.lock"), f"--output: {target}")
    # What is there is looked at with the lock held, or it might come a moment later.
    with lock:
        page = _page(target, overwrite=overwrite or resume) if gallery else None
        if target is not None:
            check_output_file(target, overwrite=overwrite or resume)
            # Rows of a run that was cut short would be lost to somebody who forgot --resume.
            if not overwrite and not resume:
                rows.refuse_partial(target)
        chosen = rows.choose_format(wanted, target, as_json=as_json, resume=resume)
        all_rows = as_json and target is None
        yield Wanted(chosen, target, resume, top, page, all_rows, workers)


def _page(target: Path | None, *, overwrite: bool) -> Path:
    """Return the file of the gallery: that of the rows with the ending .html."""
    page = Path("gallery.html") if target is None else target.with_suffix(".html")
    if page == target:
        raise ConfigError(f"--gallery: its page would be {page}, where the rows go")
    check_output_file(page, overwrite=overwrite)
    return page
