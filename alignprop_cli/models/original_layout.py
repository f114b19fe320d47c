"""The tensors of Stable Diffusion and SDXL by the names of the original code: one file for all.

The way back of `from_single_file` (diffusers.loaders.single_file_utils), whose table of names is
used here turned around. What it computes from the numbers of blocks and layers is computed here
from the same configuration. ComfyUI, A1111 and Forge read such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from alignprop_cli.errors import ConfigError

_TABLE = cast(Any, single_file_utils).DIFFUSERS_TO_LDM_MAPPING
_HINT = "--export merged writes a folder in diffusers format, which has a place for everything"

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_LAYERS = "text_model.encoder.layers."
# Of open_clip's attention, which has the three projections in one.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_Blocks = dict[str, tuple[str, Mapping[str, str]]]
"""Beginning of diffusers' name -> beginning of the original's, and the names of layers below it."""


def single_file(pipeline: Any) -> dict[str, Tensor]:
    """Return all tensors of a pipeline by their names in the original layout.

    Args:
        pipeline: Has network, autoencoder and text encoders.

    Raises:
        ConfigError: If a part has a tensor that the original layout has no name for.
    """
    # 1. The network.
    network, vae = pipeline.unet, pipeline.vae
    fixed = {**_TABLE["unet"]["layers"], **_TABLE["unet"]["addition_embed_type"]}
    state = _renamed("unet", network, fixed, _network_blocks(network.config))
    state = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    # 2. The autoencoder.
    for name, value in _renamed("vae", vae, _TABLE["vae"], _vae_blocks(vae.config)).items():
        # The original writes attention as convolutions of one pixel.
        is_matrix = ".attn_1." in name and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_matrix else value
    # 3. The text encoders: of SDXL, which has two, numbered.
    if getattr(pipeline, "text_encoder_2", None) is not None:
        state |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    # Stable Diffusion 2 has open_clip's text encoder, which has another activation than CLIP's.
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        state |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {name: value.contiguous() for name, value in state.items()}


def _renamed(
    part: str, module: torch.nn.Module, fixed: Mapping[str, str], blocks: _Blocks
) -> dict[str, Tensor]:
    """Return the tensors of a part by their new names.

    Args:
        part: Its name, for the message.
        module: The part.
        fixed: Names that are the same whatever the number of blocks is.
        blocks: The others.
    """
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        new = fixed.get(name)
        if new is None:
            start = next((start for start in blocks if name.startswith(start)), None)
            if start is None:
                raise _no_place(f"{part}.{name}")
            new = blocks[start][0] + _layer(name.removeprefix(start), blocks[start][1])
        state[new] = value
    return state


def _no_place(name: str) -> ConfigError:
    return ConfigError(
        f"--export merged-single-file: the original layout has no place for {name}", hint=_HINT
    )


def _layer(name: str, names: Mapping[str, str]) -> str:
    """Return a name such as conv1.weight with the layer's other name."""
    for old, new in names.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def _network_blocks(config: Any) -> _Blocks:
    """Return the names of a network's blocks."""
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise ConfigError(
            "--export merged-single-file: the original layout has equally many layers in every "
            f"block, this model {layers}",
            hint=_HINT,
        )
    blocks: _Blocks = {
        "mid_block.resnets.0.": ("middle_block.0.", _RESNET),
        "mid_block.attentions.0.": ("middle_block.1.", {}),
        "mid_block.resnets.1.": ("middle_block.2.", _RESNET),
    }
    # The original numbers the layers of all levels through. conv_in is number 0; a level has n
    # layers and then, as a number of its own, what halves the size.
    for level in range(len(config.down_block_types)):
        for layer in range(layers):
            place = f"input_blocks.{1 + level * (layers + 1) + layer}"
            blocks[f"down_blocks.{level}.resnets.{layer}."] = (f"{place}.0.", _RESNET)
            blocks[f"down_blocks.{level}.attentions.{layer}."] = (f"{place}.1.", {})
        place = f"input_blocks.{(level + 1) * (layers + 1)}"
        blocks[f"down_blocks.{level}.downsamplers.0.conv."] = (f"{place}.0.op.", {})
    # On the way up a level has n + 1 layers; what doubles the size is the last part of the last.
    for level, kind in enumerate(config.up_block_types):
        for layer in range(layers + 1):
            place = f"output_blocks.{level * (layers + 1) + layer}"
            blocks[f"up_blocks.{level}.resnets.{layer}."] = (f"{place}.0.", _RESNET)
            blocks[f"up_blocks.{level}.attentions.{layer}."] = (f"{place}.1.", {})
        part = 2 if "CrossAttn" in kind else 1
        place = f"output_blocks.{level * (layers + 1) + layers}"
        blocks[f"up_blocks.{level}.upsamplers.0.conv."] = (f"{place}.{part}.conv.", {})
    return blocks


def _vae_blocks(config: Any) -> _Blocks:
    """Return the names of an autoencoder's blocks."""
    blocks: _Blocks = {}
    for side in ("encoder", "decoder"):
        for number in (0, 1):
            place = f"{side}.mid_block.resnets.{number}."
            blocks[place] = (f"{side}.mid.block_{number + 1}.", _VAE_RESNET)
        blocks[f"{side}.mid_block.attentions.0."] = (f"{side}.mid.attn_1.", _VAE_ATTENTION)
    # Every level but the last changes the size.
    levels = len(config.block_out_channels)
    for level in range(levels):
        # On the way up the original counts levels from the image, diffusers from the latents.
        for side, way, number in (
            ("encoder.down", "encoder.down_blocks", level),
            ("decoder.up", "decoder.up_blocks", levels - 1 - level),
        ):
            for layer in range(config.layers_per_block + 1):
                place = f"{side}.{number}.block.{layer}."
                blocks[f"{way}.{level}.resnets.{layer}."] = (place, _VAE_RESNET)
        place = f"encoder.down.{level}.downsample.conv."
        blocks[f"encoder.down_blocks.{level}.downsamplers.0.conv."] = (place, {})
        place = f"decoder.up.{levels - 1 - level}.upsample.conv."
        blocks[f"decoder.up_blocks.{level}.upsamplers.0.conv."] = (place, {})
    return blocks


def _text_state(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a text encoder as if all of it were in a part `text_model`."""
    # As it was before transformers 5.6, and still is in encoders with a projection.
    state = encoder.state_dict()
    kept = ("text_model.", "text_projection.")
    return {n if n.startswith(kept) else f"text_model.{n}": value for n, value in state.items()}


def _clip(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of CLIP's text encoder, whose names the original takes as they are."""
    return {f"{prefix}{name}": value for name, value in _text_state(encoder).items()}


def _open_clip(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a text encoder by open_clip's names; one without a name is refused."""
    fixed: Mapping[str, str] = _TABLE["openclip"]["layers"]
    state: dict[str, Tensor] = {}
    joined: dict[str, list[Tensor]] = {}
    for name, value in _text_state(encoder).items():
        if name in fixed:
            # There the projection is x W, here x W^T.
            turned = value.T if name == "text_projection.weight" else value
            state[f"{prefix}{fixed[name]}"] = turned
            continue
        if not name.startswith(_OPEN_CLIP_LAYERS):
            raise _no_place(f"text_encoder.{name}")
        number, _, rest = name.removeprefix(_OPEN_CLIP_LAYERS).partition(".")
        place, layer = f"{prefix}transformer.resblocks.{number}.", rest.removeprefix("self_attn.")
        if layer.startswith(_PROJECTIONS):
            kind = layer.rpartition(".")[2]
            joined.setdefault(f"{place}attn.in_proj_{kind}", [value] * 3)
            joined[f"{place}attn.in_proj_{kind}"][_PROJECTIONS.index(layer.split(".")[0])] = value
        else:
            state[f"{place}{_layer(rest, _OPEN_CLIP)}"] = value
    return state | {name: torch.cat(parts) for name, parts in joined.items()}
