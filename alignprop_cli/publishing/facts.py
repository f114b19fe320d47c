"""What model cards say about published models and rewards: licences, and how a reward is fooled.

Licences are those that the pages of the models state, where they are known here; of all others the
card says that they are not. The words about rewards are those of docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignprop_cli.config.schema import EMBEDDED_MODELS
from alignprop_cli.models.published import PUBLISHED


@dataclass(frozen=True)
class Licence:
    """A licence.

    Args:
        name: For people.
        id: Of the hub's list; `other` for those that are not on it.
    """

    name: str
    id: str


@dataclass(frozen=True)
class RewardFacts:
    """What is known about a shipped reward.

    Args:
        licence: Of its weights; None where it has none.
        fooled_by: What it rewards without deserving it.
    """

    licence: str | None
    fooled_by: str


_OPENRAIL = Licence("CreativeML OpenRAIL-M", "creativeml-openrail-m")
_OPENRAIL_PLUS = Licence("CreativeML OpenRAIL++-M", "openrail++")
_STABILITY = Licence("Stability AI Community License", "other")
_FLUX_1 = Licence("FLUX.1 [dev] Non-Commercial License", "other")
_FLUX_2 = Licence("FLUX Non-Commercial License", "other")
_KREA_2 = Licence("Krea 2 Community License", "other")
_APACHE = Licence("Apache License 2.0", "apache-2.0")

# By the name in `published.PUBLISHED`.
_BASE: Mapping[str, Licence] = {
    "sd-1.5": _OPENRAIL,
    "sd-2.1": _OPENRAIL_PLUS,
    "sd-2.1-base": _OPENRAIL_PLUS,
    "sdxl": _OPENRAIL_PLUS,
    "sd-3-medium": _STABILITY,
    "sd-3.5-medium": _STABILITY,
    "sd-3.5-large": _STABILITY,
    "flux.1-dev": _FLUX_1,
    "flux.1-krea-dev": _FLUX_1,
    "flux.1-schnell": _APACHE,
    "flux.2-klein-4b": _APACHE,
    "flux.2-klein-base-4b": _APACHE,
    "flux.2-klein-9b": _FLUX_2,
    "flux.2-klein-base-9b": _FLUX_2,
    "z-image-turbo": _APACHE,
    "z-image": _APACHE,
    "qwen-image": _APACHE,
    "krea-2-raw": _KREA_2,
    "krea-2-turbo": _KREA_2,
}

_AS_HPS = "glossy, overdetailed images; variety goes down"
_AS_CLIP = "texture that only this model sees"
_NO_WEIGHTS = None

# Shortened where a card needs no more than the gist; a test compares the others word for word.
REWARDS: Mapping[str, RewardFacts] = {
    "aesthetic": RewardFacts(
        "MIT (CLIP ViT-L/14) and Apache-2.0 (LAION's head)",
        "one painterly style for every prompt, oversaturation, texture that looks like text",
    ),
    "hps": RewardFacts("Apache-2.0", _AS_HPS),
    "hps-official": RewardFacts("Apache-2.0", _AS_HPS),
    "pickscore": RewardFacts("not stated for the weights (its code is MIT)", _AS_HPS),
    "imagereward": RewardFacts("Apache-2.0", "busy, oversaturated images"),
    "hpsv3": RewardFacts("Apache-2.0", _AS_HPS),
    "vlm": RewardFacts(
        "that of the model (Apache-2.0 for Qwen2-VL-2B)",
        f"{_AS_CLIP}; words written into the image, and a plain image of what was asked for",
    ),
    "clip": RewardFacts("that of the CLIP model", _AS_CLIP),
    "clip_choice": RewardFacts(
        "that of the CLIP model",
        f"{_AS_CLIP}; an image that can be told apart need not look good",
    ),
    "clip_count": RewardFacts("that of the CLIP model", _AS_CLIP),
    "siglip": RewardFacts("Apache-2.0", f"{_AS_CLIP}; words of the prompt written into the image"),
    "count": RewardFacts("Apache-2.0", "texture that only the detector sees, and images of images"),
    "remove": RewardFacts(
        "Apache-2.0", "texture that only the detector sees, images of images, and plain images"
    ),
    "compressibility": RewardFacts(_NO_WEIGHTS, "flat colour"),
    "incompressibility": RewardFacts(_NO_WEIGHTS, "noise"),
    "brightness": RewardFacts(_NO_WEIGHTS, "white images"),
    "contrast": RewardFacts(_NO_WEIGHTS, "black and white areas"),
    "redness": RewardFacts(_NO_WEIGHTS, "red images"),
    "colourfulness": RewardFacts(_NO_WEIGHTS, "rainbow noise"),
    "symmetry": RewardFacts(_NO_WEIGHTS, "flat images"),
}


def base_licence(model: str | None) -> Licence | None:
    """Return the licence of a base model; None where it is not known here."""
    # The embedded models are of this repository.
    return _APACHE if model in EMBEDDED_MODELS else _BASE.get(PUBLISHED.get(model or "", ""))
