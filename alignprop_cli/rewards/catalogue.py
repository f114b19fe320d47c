"""The shipped rewards: where each is, its options, and what is known before it is loaded.

To ship another one, add one file to this folder and one line to `SHIPPED`. Its options are the
arguments of its constructor. They are read from the source, so that names and options are checked
before torch or a model library is loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The type of an option's value, by the annotation of the constructor's argument.
_KINDS: Mapping[str, type] = {
    **{kind.__name__: kind for kind in (str, int, float, bool)},
    "Sequence[str]": list,
}

# Text options that hold words; every other one names a file, a hub id or a prompt set. A new one
# belongs here only if no value of it can make the program load something.
_WORDS = {"object", "version", "measure", "question"}


@dataclass(frozen=True)
class Shipped:
    """Where a shipped reward is, and what must be known about it before it is loaded.

    Args:
        target: module:attribute, in this folder.
        reads_prompt: Whether its result depends on the prompt.
        instead: Option that replaces the prompt where it is set.
        trainable: Whether it has a gradient.
    """

    target: str
    reads_prompt: bool = True
    instead: str | None = None
    trainable: bool = True

    @property
    def options(self) -> Mapping[str, type]:
        """Return the name and type of each option."""
        return {name: kind for name, (kind, _) in _arguments(self.target).items()}

    @property
    def places(self) -> Mapping[str, str | None]:
        """Return the options that name a file, a hub id or a prompt set, with their defaults.

        A configuration that came with weights may set these only to what the user typed or to a
        shipped default: see config/trust.py.
        """
        return {
            name: default
            for name, (kind, default) in _arguments(self.target).items()
            if kind is str and name not in _WORDS
        }


SHIPPED: Mapping[str, Shipped] = {
    "clip": Shipped("clip:ClipReward"),
    "clip_count": Shipped("clip_count:ClipCount"),
    "clip_choice": Shipped("clip_choice:ClipChoice"),
    "aesthetic": Shipped("aesthetic:AestheticReward", reads_prompt=False),
    "hps": Shipped("hps:HpsReward"),
    "hpsv3": Shipped("hpsv3:HpsV3Reward"),
    "hps-official": Shipped("hps_official:OfficialHps", trainable=False),
    "siglip": Shipped("siglip:SiglipReward"),
    "pickscore": Shipped("pickscore:PickScore"),
    "vlm": Shipped("vlm:VlmReward"),
    "imagereward": Shipped("imagereward:ImageReward"),
    "compressibility": Shipped("jpeg:Compressibility", reads_prompt=False),
    "incompressibility": Shipped("jpeg:Incompressibility", reads_prompt=False),
    "count": Shipped("detect:Count", instead="number"),
    "remove": Shipped("detect:Remove", reads_prompt=False),
    "brightness": Shipped("pixel:brightness", reads_prompt=False),
    "redness": Shipped("pixel:redness", reads_prompt=False),
    "contrast": Shipped("pixel:contrast", reads_prompt=False),
    "colourfulness": Shipped("pixel:colourfulness", reads_prompt=False),
    "symmetry": Shipped("pixel:symmetry", reads_prompt=False),
}


@cache
def _arguments(target: str) -> Mapping[str, tuple[type, Any]]:
    """Return the arguments of a shipped reward's constructor, read from its source.

    Returns:
        The type and the default of each; the default is None where there is none.
    """
    # Parsed, not imported: an import would load torch and a model library, which takes seconds.
    module, _, name = target.partition(":")
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    body = ast.parse(source).body
    classes = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
    # A default is a literal, or a constant of the same file.
    constants = {ast.unparse(n.targets[0]): n.value for n in body if isinstance(n, ast.Assign)}
    while name in classes:
        found = classes[name]
        for node in found.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments, defaults = node.args.args[1:], node.args.defaults
                # As in a call, defaults belong to the last arguments.
                required = [ast.Constant(None)] * (len(arguments) - len(defaults))
                values = [constants.get(ast.unparse(d), d) for d in (*required, *defaults)]
                return {
                    a.arg: (_kind(a.annotation), ast.literal_eval(value))
                    for a, value in zip(arguments, values, strict=True)
                }
        # No constructor of its own: look at its base class, which is in the same file.
        name = ast.unparse(found.bases[0])
    return {}  # a function, which takes no options


def _kind(annotation: ast.expr | None) -> type:
    """Return the type that an annotation such as `str | None` allows besides None."""
    text = "" if annotation is None else ast.unparse(annotation)
    return _KINDS[text.removesuffix(" | None")]
