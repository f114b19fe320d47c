"""The prompt inside an image file, as this program, A1111 or ComfyUI wrote it.

A wrong prompt gives a wrong score, so where the prompt is not certain, none is returned: nodes and
texts of ComfyUI are taken by name, and whatever is not listed here could change the prompt.

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

import re
from collections.abc import Mapping
from typing import Any, cast

from alignprop_cli.parsing import ParseError, read_json


class Unclear(Exception):
    """A text that holds a prompt, but not certainly which; the message says why."""


# A1111's text: the prompt, "Negative prompt: ...", and a line of settings such as
# "Steps: 20, Sampler: Euler a". A line of a prompt may begin "Steps:" too, so that a comma must be
# followed by the name of another setting.
_NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
_STEPS = re.compile(r"^Steps: \d+(?:, [A-Z][\w ]*: |,?\s*$)", re.MULTILINE)
# The prompt also selects LoRAs: <lora:name:0.8>.
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")

# What stands for another text: a wildcard (__animal__), alternatives ({red|blue}), a learned token
# by the name of its file (embedding:style), and a text that is nothing but the name of a file.
_STANDS_FOR_ANOTHER = {
    re.compile(r"__[^\s_](?:\S*?[^\s_])?__"): "a wildcard",
    re.compile(r"\{[^{}]*\|[^{}]*\}"): "alternatives",
    re.compile(r"\bembedding:\S"): "an embedding",
    re.compile(r"\A\S+\.(?:txt|csv|jsonl?|ya?ml|caption|safetensors|pt)\Z", re.IGNORECASE): (
        "the name of a file"
    ),
}

# ComfyUI's nodes by name: text encoders, and those of their inputs that are texts; nodes that are
# one text, with its input; and nodes that pass a conditioning on with its text as it is. A node
# with two outputs has the positive one first.
_ENCODERS = {
    "CLIPTextEncode",
    "CLIPTextEncodeSDXL",
    "CLIPTextEncodeSDXLRefiner",
    "CLIPTextEncodeSD3",
    "CLIPTextEncodeFlux",
    "CLIPTextEncodePixArtAlpha",
}
_ENCODED = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl")
_TEXTS: Mapping[str, str] = {
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "StringConstant": "string",
    "StringConstantMultiline": "string",
    "String Literal": "string",
    "Text Multiline": "text",
    "CR Text": "text",
    "CR Prompt Text": "prompt",
}
_PASSING: Mapping[str, tuple[str, ...]] = {
    "BasicGuider": ("conditioning",),
    "CFGGuider": ("positive",),
    "ConditioningCombine": ("conditioning_1", "conditioning_2"),
    "ConditioningConcat": ("conditioning_to", "conditioning_from"),
    "ControlNetApply": ("conditioning",),
    "ControlNetApplyAdvanced": ("positive", "negative"),
    "ControlNetApplySD3": ("positive", "negative"),
    "FluxGuidance": ("conditioning",),
    "InpaintModelConditioning": ("positive", "negative"),
}


def embedded_prompt(texts: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the prompt that an image file holds, and which program has written it.

    Args:
        texts: The texts of the file, as in `files.Decoded`: `prompt` has our prompt or ComfyUI's
            graph; `parameters` (in a PNG) or `UserComment` (elsewhere) has A1111's text.

    Returns:
        The prompt, None where there is none, and its source, one of `captions.SOURCES`.

    Raises:
        Unclear: If there is one, but it is not certain which.
    """
    own = texts.get("prompt", "").strip()
    graph = _graph(own)
    if own and graph is None:
        return own, "image"
    for text in (texts.get("parameters"), texts.get("UserComment")):
        # Without a line of settings the text may be anything, such as a camera's comment.
        if text is not None and _STEPS.search(text) and (prompt := from_infotext(text)):
            return prompt, "a1111"
    if graph is not None and (asked := _asked(graph)) is not None:
        return asked, "comfyui"
    return None, "none"


def from_infotext(text: str) -> str:
    """Return the prompt in a text as A1111 writes it, or the whole text where it is no such text.

    Raises:
        Unclear: If the prompt holds what stands for another text.
    """
    # The last line that looks like settings is the settings: the prompt may have one as well. The
    # first negative prompt before it ends the prompt.
    end = max((match.start() for match in _STEPS.finditer(text)), default=len(text))
    if negative := _NEGATIVE.search(text, 0, end):
        end = negative.start()
    if end == len(text):
        return _certain(text.strip())
    # Tags of LoRAs are not part of the prompt.
    return _certain(" ".join(_NETWORKS.sub("", text[:end]).split()))


def _certain(text: str) -> str:
    """Return the text of a prompt, unless it stands for another one."""
    for pattern, what in _STANDS_FOR_ANOTHER.items():
        if found := pattern.search(text):
            raise Unclear(f"its prompt has {what}, '{found[0][:60]}'")
    return text


def _graph(text: str) -> dict[str, Any] | None:
    """Return ComfyUI's graph, its nodes by number; None where the text is something else."""
    if not text.startswith("{"):
        return None
    try:
        # ComfyUI writes NaN for nodes that always run.
        graph: Any = read_json(text, strict=False)
    except ParseError:
        return None
    if not isinstance(graph, dict):
        return None
    nodes = cast(dict[str, Any], graph)
    shaped = nodes and all(isinstance(n, dict) and "class_type" in n for n in nodes.values())
    return nodes if shaped else None


def _asked(graph: Mapping[str, Any]) -> str | None:
    """Return the text that reaches all samplers as their positive prompt; None without samplers.

    Raises:
        Unclear: If it is not exactly one, or if a node on the way is unknown.
    """
    # Walk from the samplers against the links to the text encoders, and visit each output once: a
    # damaged graph may have circles.
    samplers = [node for node in graph.values() if "Sampler" in _kind(node)]
    pending = [
        link for node in samplers for key in ("positive", "guider") for link in _link(node, key)
    ]
    seen: set[tuple[str, int]] = set()
    found: set[str] = set()
    while pending:
        name, output = pending.pop()
        if (name, output) in seen:
            continue
        seen.add((name, output))
        if name not in graph:
            raise Unclear("the graph of ComfyUI has a link to a node that is not there")
        node = graph[name]
        if (kind := _kind(node)) in _ENCODERS:
            found |= _encoded(graph, node)
        elif kind in _PASSING:
            keys = _PASSING[kind]
            # Of two outputs each has its own input.
            keys = keys[output : output + 1] if "negative" in keys else keys
            pending += [link for key in keys for link in _link(node, key)]
        else:
            raise Unclear(f"ComfyUI's node '{kind[:60]}' may change the prompt")
    if len(found) > 1:
        raise Unclear(f"the graph of ComfyUI has {len(found)} prompts")
    return found.pop() if found else None


def _kind(node: Mapping[str, Any]) -> str:
    return str(node["class_type"])


def _inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = node.get("inputs")
    return cast(dict[str, Any], inputs) if isinstance(inputs, dict) else {}


def _link(node: Mapping[str, Any], key: str) -> list[tuple[str, int]]:
    """Return the node and the output that an input comes from, if it is linked."""
    # A link is [number of the node, index of its output]; anything else is a plain value.
    value = _inputs(node).get(key)
    if not isinstance(value, list):
        return []
    match cast(list[Any], value):
        case [str() | int() as name, int(output)]:
            return [(str(name), output)]
        case _:
            raise Unclear("the graph of ComfyUI has a damaged link")


def _encoded(graph: Mapping[str, Any], node: Mapping[str, Any]) -> set[str]:
    """Return the texts that a text encoder is given.

    Raises:
        Unclear: If one is uncertain.
    """
    # Encoders of SDXL and FLUX take two, which are usually the same; a set has them once.
    found: set[str] = set()
    for key in _ENCODED:
        value = _inputs(node).get(key)
        for name, _ in _link(node, key):
            source = graph.get(name, {"class_type": "missing"})
            if _kind(source) not in _TEXTS:
                raise Unclear(f"ComfyUI's node '{_kind(source)[:60]}' may change the prompt")
            value = _inputs(source).get(_TEXTS[_kind(source)])
        if not isinstance(value, str | None):
            raise Unclear("the graph of ComfyUI has a prompt that is no text")
        if value and value.strip():
            found.add(_certain(value.strip()))
    return found
