"""From the names of layers in a LoRA file to their names in the network."""

from __future__ import annotations

import re
from collections.abc import Iterable

NETWORKS = ("unet.", "transformer.")
"""What diffusers puts before the names of the network's layers: its name in the pipeline."""

PEFT = "base_model.model."
"""What PEFT puts there."""

KOHYA = "lora_unet_"
"""What kohya's trainers put before the names of a network's layers, which have _ for dots."""

COMFYUI = "diffusion_model."
"""What ComfyUI puts before the names of a network's layers, mostly those of the original code."""

WHOSE = {COMFYUI: "ComfyUI's", KOHYA: "kohya's"}
"""Whose names they are, for messages."""

# Old versions of diffusers put the LoRA into the attention processors.
_OLD = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")

# kohya writes _ for every dot. These are the words of a UNet's names that contain a _ themselves.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "time_embedding"),
    *("add_embedding", "cond_proj", "time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out"),
    *("conv_shortcut", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
)
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)}|[a-z]+\d*|\d+)(?=_|$)")
_FIRST_WORDS = {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out"}
_FIRST_WORDS |= {"time_embedding", "add_embedding"}
# The same of a transformer's names, which no kohya name is split into.
_TRANSFORMER_WORDS = {"transformer_blocks", "single_transformer_blocks", "context_embedder"}
_TRANSFORMER_WORDS |= {"x_embedder", "pos_embed", "time_text_embed", "norm_out", "proj_out"}
# Of FLUX.2 and Z-Image.
_TRANSFORMER_WORDS |= {"time_guidance_embed", "single_stream_modulation", "cap_embedder"}
_TRANSFORMER_WORDS |= {"double_stream_modulation_img", "double_stream_modulation_txt", "layers"}
_TRANSFORMER_WORDS |= {"noise_refiner", "context_refiner", "t_embedder", "all_x_embedder"}
_TRANSFORMER_WORDS |= {"all_final_layer"}
# Of Krea 2, and the first two of Qwen-Image.
_TRANSFORMER_WORDS |= {"img_in", "txt_in", "time_embed", "time_mod_proj", "text_fusion"}
_TRANSFORMER_WORDS |= {"final_layer"}

# The original code numbers the blocks of a network with two layers a level through, downsamplers
# and upsamplers among them. kohya's trainer names the layers of Stable Diffusion XL so.
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)")
_ORIGINAL_ENDS = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}

# Characters of a layer's name: a longer one is no layer's, and would make matching it slow.
_LONGEST_LAYER = 200


def network_of(names: Iterable[str]) -> str:
    """Return diffusers' prefix of these names; a U-Net's where they have none."""
    for name in names:
        if name.startswith(NETWORKS):
            return next(prefix for prefix in NETWORKS if name.startswith(prefix))
        peft = name.startswith(PEFT) and is_transformers(name.removeprefix(PEFT))
        if peft or original_prefix(name) is not None:
            return NETWORKS[1]
    return NETWORKS[0]


def original_prefix(name: str) -> str | None:
    """Return what is before a name that original.py knows; None before other names.

    These are ComfyUI's, and kohya's where they are no UNet's: both are read of transformers alone.
    """
    if name.startswith(COMFYUI):
        return COMFYUI
    if name.startswith(KOHYA) and _in_unet(name.removeprefix(KOHYA).split(".")[0]) is None:
        return KOHYA
    return None


def is_transformers(layer: str) -> bool:
    """Return whether a layer's name begins as one of diffusers' transformers."""
    return layer.split(".")[0] in _TRANSFORMER_WORDS


def without_network(name: str) -> str:
    """Return a name without diffusers' prefix."""
    return name.removeprefix(network_of([name]))


def present(name: str) -> str:
    """Return the present name of a tensor from an old version of diffusers."""

    def rename(found: re.Match[str]) -> str:
        layer = "to_out.0" if found[1] == "to_out" else found[1]
        return f".{layer}.lora.{found[2]}.weight"

    return _OLD.sub(rename, name)


def layer_of(name: str) -> str | None:
    """Return the layer's name in the network from its name in the file; None if it is unknown.

    Of one with an `original_prefix` it is the name behind that.
    """
    if len(name) > _LONGEST_LAYER:
        return None
    if name.startswith(NETWORKS):
        return without_network(name)
    if name.startswith(PEFT):
        layer = name.removeprefix(PEFT)
        is_known = is_transformers(layer) or layer.split(".")[0] in _FIRST_WORDS
        return layer if is_known else None
    if name.startswith(COMFYUI):
        return name.removeprefix(COMFYUI)
    if name.startswith(KOHYA):
        flat = name.removeprefix(KOHYA)
        return None if "." in flat else _in_unet(flat) or flat
    return None


def _in_unet(flat: str) -> str | None:
    """Return the name in a UNet of a layer with kohya's name; None if it is of no UNet."""
    flat = _present_flat(flat)
    # Split into the known words of a UNet's names: there is one way only, so the renaming can be
    # undone. What does not split belongs to another network.
    words = _WORD.findall(flat)
    if not words or "_".join(words) != flat or words[0] not in _FIRST_WORDS:
        return None
    return ".".join(words)


def _present_flat(flat: str) -> str:
    """Return diffusers' name of a layer, _ for dots, from that of the original code.

    Other names are returned as they are.
    """
    found = _ORIGINAL.fullmatch(flat)
    if flat in _ORIGINAL_ENDS or found is None:
        return _ORIGINAL_ENDS.get(flat, flat)
    side, number, kind, rest = found[1], int(found[2]), found[3], found[4]
    if side == "middle_block":
        # resnet, attention, resnet; the kind is part of the layer's own name there.
        rest = rest if kind is None else f"{kind}_{rest}"
        block = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}.get(number)
        return flat if block is None else f"mid_block_{block}_{_ORIGINAL_RESNET.get(rest, rest)}"
    if side == "input_blocks":
        # conv_in is number 0; each level has two layers and a downsampler.
        level, place = divmod(number - 1, 3)
        if rest == "op":
            return f"down_blocks_{level}_downsamplers_0_conv"
    else:
        # Each level has three layers; the upsampler comes after the last.
        level, place = divmod(number, 3)
        if rest == "conv":
            return f"up_blocks_{level}_upsamplers_0_conv"
    block = "down_blocks" if side == "input_blocks" else "up_blocks"
    part = {"0": "resnets", "1": "attentions"}.get(kind or "")
    return (
        flat
        if part is None
        else (f"{block}_{level}_{part}_{place}_{_ORIGINAL_RESNET.get(rest, rest)}")
    )
