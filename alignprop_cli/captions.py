"""The prompt of a picture file: asked for, from a table, beside it, inside it, or by its place."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.pictures import Found
from alignprop_cli.prompts import HPD_STYLES, load_prompts

PROMPT_COLUMNS = ("prompt", "text", "caption")
SOURCES = (
    "flag",
    "file",
    "metadata",
    "sidecar",
    "picture",
    "a1111",
    "comfyui",
    "geneval",
    "hpd",
    "none",
)
"""Where a prompt can be from, in the order in which they are asked."""

_METADATA = ("metadata.jsonl", "metadata.csv")
_SIDECARS = (".txt", ".caption")

_NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
_STEPS = re.compile(r"^Steps: \d+", re.MULTILINE)
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
# Where the nodes of ComfyUI keep a text, and where they pass on what another node made of one.
_GRAPH_TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "string", "value")
_GRAPH_LINKS = ("positive", "conditioning", "conditioning_1", "conditioning_2", "guider")
_HPD_NAME = re.compile(r"\d{5}")

Table = dict[str, str]
"""Prompt by file name as written, with forward slashes."""


def read_table(path: Path) -> Table:
    """Read which prompt belongs to which file, from .jsonl or .csv.

    Each line or row has `file_name`, and the prompt as `prompt`, `text` or `caption`.

    Raises:
        AssetError: If it cannot be read.
        ConfigError: If it is of another kind, or a line lacks something; names the line.
    """
    table: Table = {}
    for line, row in _rows(path):
        name, prompt = row.get("file_name"), _prompt(row)
        if not isinstance(name, str) or prompt is None:
            raise ConfigError(
                f"prompts: {path}:{line}: expected file_name and one of "
                f"{', '.join(PROMPT_COLUMNS)} as texts, got {', '.join(map(str, row)) or 'nothing'}"
            )
        table[name.replace("\\", "/").removeprefix("./")] = prompt
    return table


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"prompts: {path}: expected a .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"prompts: cannot read {path}: {error}") from error
    return list(readers[path.suffix.lower()](text, path))


def _prompt(row: Mapping[str, Any]) -> str | None:
    prompt = next((row[c] for c in PROMPT_COLUMNS if row.get(c) is not None), None)
    return prompt if isinstance(prompt, str) else None


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines: a JSON text may hold other line separators than \n.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"prompts: {path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"prompts: {path}:{number}: expected an object, got {line.strip()!r}")
        yield number, cast(Mapping[str, Any], row)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True))
    for row in rows:
        yield rows.line_num, row


@dataclass
class PromptFinder:
    """Finds the prompt of a picture, from the first of `SOURCES` that has one.

    Args:
        prompt: One for all pictures.
        table: A file that says which prompt belongs to which picture.

    Raises:
        AssetError, ConfigError: As `read_table`.
    """

    prompt: str | None = None
    table: Path | None = None
    _tables: dict[Path, Table] = field(default_factory=dict[Path, Table], repr=False)
    _geneval: dict[Path, str | None] = field(default_factory=dict[Path, "str | None"], repr=False)
    _styles: dict[str, list[str]] = field(default_factory=dict[str, list[str]], repr=False)

    def find(self, found: Found, texts: Mapping[str, str]) -> tuple[str | None, str]:
        """Return the prompt, None where there is none, and its source, one of `SOURCES`.

        Args:
            found: The picture.
            texts: What the picture itself carries.

        Raises:
            AssetError, ConfigError: As `read_table`, for a metadata file beside the picture; as
                `load_prompts`, for pictures of HPDv2's benchmark.
        """
        if self.prompt is not None:
            return self.prompt, "flag"
        if self.table is not None:
            prompt = self._look_up(self.table, found.path, (found.root, self.table.parent))
            if prompt is not None:
                return prompt, "file"
        for folder in _upwards(found.path.parent, found.root):
            for name in _METADATA:
                if (folder / name).is_file() and self._of_geneval(folder / name) is None:
                    prompt = self._look_up(folder / name, found.path, (folder,))
                    if prompt is not None:
                        return prompt, "metadata"
        for suffix in _SIDECARS:
            sidecar = found.path.with_suffix(suffix)
            if sidecar.is_file():
                text = sidecar.read_text(encoding="utf-8-sig", errors="replace").strip()
                if text:
                    return text, "sidecar"
        prompt, source = carried(texts)
        return (prompt, source) if prompt is not None else self._by_place(found.path)

    def _look_up(self, file: Path, picture: Path, roots: Iterable[Path]) -> str | None:
        if file not in self._tables:
            self._tables[file] = read_table(file)
        table, resolved = self._tables[file], picture.resolve()
        names = [resolved.as_posix()]
        for root in roots:
            if resolved.is_relative_to(root.resolve()):
                names.append(resolved.relative_to(root.resolve()).as_posix())
        return next((table[name] for name in names if name in table), None)

    def _by_place(self, path: Path) -> tuple[str | None, str]:
        """Return the prompt that a benchmark's layout of folders implies."""
        # GenEval: NNNNN/metadata.jsonl beside NNNNN/samples/; the grid beside it is no sample.
        if path.parent.name == "samples":
            prompt = self._of_geneval(path.parent.parent / "metadata.jsonl")
            if prompt is not None:
                return prompt, "geneval"
        # HPSv2: style/NNNNN.jpg, numbered as the prompts of the style are.
        style = path.parent.name
        if style in HPD_STYLES and _HPD_NAME.fullmatch(path.stem):
            if style not in self._styles:
                self._styles[style] = load_prompts(f"hpd:{style}")
            if int(path.stem) < len(self._styles[style]):
                return self._styles[style][int(path.stem)], "hpd"
        return None, "none"

    def _of_geneval(self, file: Path) -> str | None:
        if file not in self._geneval:
            self._geneval[file] = _geneval(file)
        return self._geneval[file]


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    """Yield a folder and those above it, up to the root."""
    while True:
        yield folder
        if folder == root or not folder.is_relative_to(root):
            return
        folder = folder.parent


def carried(texts: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the prompt that a picture carries, and which program has written it.

    Args:
        texts: As `pictures.Decoded` has them: ours and ComfyUI's graph as `prompt`, A1111's as
            `parameters` in a PNG and as `UserComment` elsewhere.
    """
    own = texts.get("prompt", "").strip()
    graph = _graph(own)
    if own and graph is None:
        return own, "picture"
    for text in (texts.get("parameters"), texts.get("UserComment")):
        if text is not None and (prompt := _a1111(text)):
            return prompt, "a1111"
    if graph is not None and len(found := _asked(graph)) == 1:
        return found.pop(), "comfyui"
    return None, "none"


def _a1111(text: str) -> str | None:
    """Return what stands above the negative prompt and the settings; None without settings."""
    settings = _STEPS.search(text)
    if settings is None:
        return None
    negative = _NEGATIVE.search(text)
    end = min(match.start() for match in (settings, negative) if match is not None)
    return " ".join(_NETWORKS.sub("", text[:end]).split()) or None


def _graph(text: str) -> dict[str, Any] | None:
    """Return ComfyUI's graph, nodes by their number; None where the text is something else."""
    if not text.startswith("{"):
        return None
    try:
        # ComfyUI writes NaN for what has changed since; Python reads that.
        graph: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast(dict[str, Any], graph)
    shaped = nodes and all(isinstance(n, dict) and "class_type" in n for n in nodes.values())
    return nodes if shaped else None


def _asked(graph: Mapping[str, Any]) -> set[str]:
    """Return the texts that reach a sampler as what it shall draw: one where that is clear."""
    starts = [
        node
        for node in graph.values()
        if "Sampler" in str(node["class_type"]) and isinstance(node.get("inputs"), dict)
    ]
    found: set[str] = set()
    seen: set[str] = set()
    pending = [n["inputs"].get(key) for n in starts for key in ("positive", "guider")]
    while pending:
        link = pending.pop()
        name = str(link[0]) if isinstance(link, list) and link else None
        if name is None or name in seen or name not in graph:
            continue
        seen.add(name)
        inputs = graph[name].get("inputs")
        if not isinstance(inputs, dict):
            continue
        values = cast(dict[str, Any], inputs)
        texts = [values[key] for key in _GRAPH_TEXTS if key in values]
        found |= {text.strip() for text in texts if isinstance(text, str) and text.strip()}
        pending += [text for text in texts if isinstance(text, list)]
        pending += [values.get(key) for key in _GRAPH_LINKS]
    return found


def _geneval(file: Path) -> str | None:
    """Return the prompt of GenEval's metadata: one object, with a tag and no file name."""
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    rows = _rows(file)
    if len(rows) != 1 or "tag" not in rows[0][1] or "file_name" in rows[0][1]:
        return None
    return _prompt(rows[0][1])
