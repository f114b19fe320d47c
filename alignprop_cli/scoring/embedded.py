"""The prompt inside an image file, as this program, A1111 or ComfyUI wrote it.

A wrong prompt gives a wrong score, so where the prompt is not certain, none is returned.

The package sd-parsers reads the same kinds of files. Version 0.6 was tried on the graphs and texts
of tests/scoring/test_captions.py and on JPEG files, and is not used because
  - of 200 JPEG files read in a row it gave 21 the prompt of another file: it remembers the last
    comment by the id() of the image, which Python reuses;
  - it raises TypeError on unusual graphs, and reads no graph without the editor's `workflow`;
  - it finds no prompt in the encoders of SDXL, behind the guider of FLUX, in a text node, or in an
    EXIF comment that is not big-endian UTF-16;
  - it takes the text behind a node that it does not know, and returns two where two are combined.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

# A1111's text: the prompt, "Negative prompt: ...", and a line of settings that begins "Steps: 20".
_NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
_STEPS = re.compile(r"^Steps: \d+", re.MULTILINE)
# The prompt also selects LoRAs: <lora:name:0.8>.
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
# Inputs of ComfyUI's nodes: those of text encoders that take a text, and those through which nodes
# pass on an encoded text.
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
        texts: The texts of the file, as in `files.Decoded`: `prompt` has our prompt or ComfyUI's
            graph; `parameters` (in a PNG) or `UserComment` (elsewhere) has A1111's text.

    Returns:
        The prompt, None where no prompt is certain, and its source, one of `captions.SOURCES`.
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
    """Return the text before the negative prompt and the settings; None without settings."""
    # Without a line of settings the text may be anything, such as a camera's comment.
    settings = _STEPS.search(text)
    if settings is None:
        return None
    # Whichever of the two comes first ends the prompt. Tags of LoRAs are not part of it.
    negative = _NEGATIVE.search(text)
    end = min(match.start() for match in (settings, negative) if match is not None)
    return " ".join(_NETWORKS.sub("", text[:end]).split()) or None


def _graph(text: str) -> dict[str, Any] | None:
    """Return ComfyUI's graph, its nodes by number; None where the text is something else."""
    if not text.startswith("{"):
        return None
    try:
        # ComfyUI writes NaN for nodes that always run; Python's reader accepts it.
        graph: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast(dict[str, Any], graph)
    shaped = nodes and all(isinstance(n, dict) and "class_type" in n for n in nodes.values())
    return nodes if shaped else None


def _asked(graph: Mapping[str, Any]) -> str | None:
    """Return the text that reaches all samplers as their positive prompt; None unless it is one.

    Also None if a node on the way is unknown: it could change the text.
    """
    # Walk from the samplers against the links to the text encoders, and visit each node once: a
    # damaged graph may have circles.
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
            return None  # an unknown node made this conditioning
        pending += onward
    return found.pop() if len(found) == 1 else None


def _inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = node.get("inputs")
    return cast(dict[str, Any], inputs) if isinstance(inputs, dict) else {}


def _links(graph: Mapping[str, Any], node: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return the numbers of the nodes that some inputs come from."""
    # A link is [number of the node, index of its output]; anything else is a plain value.
    values = [_inputs(node).get(key) for key in keys]
    names = [str(value[0]) for value in values if isinstance(value, list) and value]
    return [name for name in names if name in graph]


def _encoded(graph: Mapping[str, Any], node: Mapping[str, Any]) -> set[str] | None:
    """Return the texts that a text encoder is given; None where one is uncertain."""
    # Encoders of SDXL and FLUX take two, which are usually the same; a set has them once.
    found: set[str] = set()
    for key in _GRAPH_TEXTS:
        value = _inputs(node).get(key)
        if isinstance(value, list):
            # A node whose only input is a text, not a link, passes that text on.
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
