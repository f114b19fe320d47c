"""The prompt inside an image file, as this program, A1111 or ComfyUI wrote it.

The package sd-parsers reads the same kinds of files and was tried (version 0.6) on the graphs and
texts of tests/scoring/test_captions.py and on JPEG files:
  - of 200 JPEG files read in a row it gave 21 the prompt of another file, since it remembers the
    last comment by the id() of the image, which Python reuses;
  - it raises TypeError on odd graphs, and reads none without the editor's `workflow`;
  - it finds no prompt in the encoders of SDXL, behind the guider of FLUX, in a text node, or in an
    EXIF comment that is not big-endian UTF-16;
  - it takes a text behind a node that it does not know, and gives two where two are combined.
A wrong prompt is a wrong score, so here what is not certain is no prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

_NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
_STEPS = re.compile(r"^Steps: \d+", re.MULTILINE)
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
# Where the nodes of ComfyUI keep a text, and where they pass on what another node made of one.
_GRAPH_TEXTS = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl")
_GRAPH_LINKS = (
    "positive",
    "guider",
    "conditioning",
    "conditioning_1",
    "conditioning_2",
    "conditioning_to",
    "conditioning_from",
)


def embedded_prompt(texts: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the prompt that an image file holds, and which program has written it.

    Args:
        texts: As `files.Decoded` has them: ours and ComfyUI's graph as `prompt`, A1111's as
            `parameters` in a PNG and as `UserComment` elsewhere.

    Returns:
        The prompt, None where there is none for certain, and one of `captions.SOURCES`.
    """
    own = texts.get("prompt", "").strip()
    graph = _graph(own)
    if own and graph is None:
        return own, "image"
    for text in (texts.get("parameters"), texts.get("UserComment")):
        if text is not None and (prompt := _a1111(text)):
            return prompt, "a1111"
    if graph is not None and (asked := _asked(graph)) is not None:
        return asked, "comfyui"
    return None, "none"


def _a1111(text: str) -> str | None:
    """Return what stands above the negative prompt and the settings; None without settings."""
    # Without its line of settings a comment may be anything, such as a camera's.
    settings = _STEPS.search(text)
    if settings is None:
        return None
    # Whichever comes first ends the prompt; a LoRA's tag is no word of it.
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
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast(dict[str, Any], graph)
    shaped = nodes and all(isinstance(n, dict) and "class_type" in n for n in nodes.values())
    return nodes if shaped else None


def _asked(graph: Mapping[str, Any]) -> str | None:
    """Return the one text that reaches every sampler as its positive prompt; else None.

    A node that is not understood may change the text: then there is none.
    """
    # From the samplers against the direction of the links, to the text encoders.
    samplers = [node for node in graph.values() if "Sampler" in str(node["class_type"])]
    pending = [name for node in samplers for name in _links(graph, node, ("positive", "guider"))]
    seen: set[str] = set()
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph[name]
        if str(node["class_type"]).startswith("CLIPTextEncode"):
            texts = _encoded(graph, node)
            if texts is None:
                return None
            found |= texts
            continue
        onward = _links(graph, node, _GRAPH_LINKS)
        if not onward:
            return None  # a dead end: what made this conditioning is not known
        pending += onward
    return found.pop() if len(found) == 1 else None


def _inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = node.get("inputs")
    return cast(dict[str, Any], inputs) if isinstance(inputs, dict) else {}


def _links(graph: Mapping[str, Any], node: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return the numbers of the nodes that some inputs come from."""
    values = [_inputs(node).get(key) for key in keys]
    names = [str(value[0]) for value in values if isinstance(value, list) and value]
    return [name for name in names if name in graph]


def _encoded(graph: Mapping[str, Any], node: Mapping[str, Any]) -> set[str] | None:
    """Return the texts that a text encoder is given; None where one is not clear."""
    found: set[str] = set()
    for key in _GRAPH_TEXTS:
        value = _inputs(node).get(key)
        if isinstance(value, list):
            # A node that holds one text and is given nothing passes on that text.
            sources = _links(graph, node, (key,))
            inputs = list(_inputs(graph[sources[0]]).values()) if sources else []
            if len(inputs) != 1:
                return None
            value = inputs[0]
        if value is not None and not isinstance(value, str):
            return None
        if value and value.strip():
            found.add(value.strip())
    return found
