"""From the layers of transformers, named as in the original code, to those of diffusers.

ComfyUI's files have these names, and kohya's, with _ for every dot.

Where the original code has one matrix and diffusers several, or its rows in another order, the rows
are told apart: each row of B A is that row of B times A. So every part has all of A and its rows of
B, and the update is the same.

Source: diffusers' converters of whole models (0.42), loaders/single_file_utils.py, such as
`convert_flux_transformer_checkpoint_to_diffusers`. Its converters of LoRA files are not used: they
lose or refuse some alphas, leave `norm_out` of FLUX.2 and `qkv` of Z-Image as they are, and there
is none for Stable Diffusion 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from alignprop_cli.errors import AssetError
from alignprop_cli.lora.factors import Factors, Layers
from alignprop_cli.lora.names import KOHYA, WHOSE, is_transformers
from alignprop_cli.lora.settings import shown


@dataclass(frozen=True)
class _Place:
    """The layers of diffusers that a layer of the original code is.

    Args:
        names: One below the other, {} for the number of the block.
        ratios: What out / in of the layer there may be; empty where it may be anything.
        shares: Rows of each name, relative to one another.
        swaps: Whether a layer of ratio 2, which is shift and scale, has them swapped in diffusers.
    """

    names: tuple[str, ...]
    ratios: tuple[Fraction | int, ...] = ()
    shares: tuple[int, ...] = (1,)
    swaps: bool = False

    def fits(self, factors: Factors) -> bool:
        """Return whether the layer has such a shape."""
        out, inputs, *kernel = factors.shape
        return not self.ratios or (not kernel and Fraction(out, inputs) in self.ratios)

    def parts(self, factors: Factors) -> list[Factors]:
        """Return the factors of each name."""
        out, inputs = factors.shape[:2]
        swaps = self.swaps and out == 2 * inputs
        if len(self.names) == 1 and not swaps:
            return [factors]
        rows = torch.arange(out).roll(inputs if swaps else 0)
        sizes = [out // sum(self.shares) * share for share in self.shares]
        # Cloned, as no file can hold a tensor twice.
        return [
            replace(
                factors,
                down=factors.down.clone(),
                up=factors.up[part],
                magnitude=None if factors.magnitude is None else factors.magnitude[part],
            )
            for part in rows.split(sizes)
        ]


def _one(name: str, *ratios: Fraction | int, swaps: bool = False) -> _Place:
    return _Place((name,), ratios, swaps=swaps)


def _three(start: str, *names: str) -> _Place:
    return _Place(tuple(f"{start}.{name}" for name in names), (3,), (1, 1, 1))


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_D, _S = "transformer_blocks.{}", "single_transformer_blocks.{}"

# By the original name, without the block's number. FLUX.1 and FLUX.2 have in common:
_FLUX = {
    "img_in": _one("x_embedder"),
    "txt_in": _one("context_embedder"),
    "double_blocks.img_attn.qkv": _three(f"{_D}.attn", *_QKV),
    "double_blocks.img_attn.proj": _one(f"{_D}.attn.to_out.0"),
    "double_blocks.txt_attn.qkv": _three(f"{_D}.attn", *_ADDED),
    "double_blocks.txt_attn.proj": _one(f"{_D}.attn.to_add_out"),
    "final_layer.adaLN_modulation.1": _one("norm_out.linear", 2, swaps=True),
    "final_layer.linear": _one("proj_out"),
}
# They are told apart by layers that one of them lacks, and by the width of the feed-forward layers,
# of a width d: 4 d, and in FLUX.2 3 d with as much again for its gate.
_FLUX1 = _FLUX | {
    "time_in.in_layer": _one("time_text_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": _one("time_text_embed.timestep_embedder.linear_2"),
    "guidance_in.in_layer": _one("time_text_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": _one("time_text_embed.guidance_embedder.linear_2"),
    "vector_in.in_layer": _one("time_text_embed.text_embedder.linear_1"),
    "vector_in.out_layer": _one("time_text_embed.text_embedder.linear_2"),
    "double_blocks.img_mod.lin": _one(f"{_D}.norm1.linear"),
    "double_blocks.img_mlp.0": _one(f"{_D}.ff.net.0.proj", 4),
    "double_blocks.img_mlp.2": _one(f"{_D}.ff.net.2", Fraction(1, 4)),
    "double_blocks.txt_mod.lin": _one(f"{_D}.norm1_context.linear"),
    "double_blocks.txt_mlp.0": _one(f"{_D}.ff_context.net.0.proj", 4),
    "double_blocks.txt_mlp.2": _one(f"{_D}.ff_context.net.2", Fraction(1, 4)),
    "single_blocks.modulation.lin": _one(f"{_S}.norm.linear"),
    "single_blocks.linear1": _Place(
        (*(f"{_S}.attn.{name}" for name in _QKV), f"{_S}.proj_mlp"), (7,), (1, 1, 1, 4)
    ),
    "single_blocks.linear2": _one(f"{_S}.proj_out", Fraction(1, 5)),
}
_FLUX2 = _FLUX | {
    "time_in.in_layer": _one("time_guidance_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": _one("time_guidance_embed.timestep_embedder.linear_2"),
    "guidance_in.in_layer": _one("time_guidance_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": _one("time_guidance_embed.guidance_embedder.linear_2"),
    "double_stream_modulation_img.lin": _one("double_stream_modulation_img.linear"),
    "double_stream_modulation_txt.lin": _one("double_stream_modulation_txt.linear"),
    "single_stream_modulation.lin": _one("single_stream_modulation.linear"),
    "double_blocks.img_mlp.0": _one(f"{_D}.ff.linear_in", 6),
    "double_blocks.img_mlp.2": _one(f"{_D}.ff.linear_out", Fraction(1, 3)),
    "double_blocks.txt_mlp.0": _one(f"{_D}.ff_context.linear_in", 6),
    "double_blocks.txt_mlp.2": _one(f"{_D}.ff_context.linear_out", Fraction(1, 3)),
    "single_blocks.linear1": _one(f"{_S}.attn.to_qkv_mlp_proj", 9),
    "single_blocks.linear2": _one(f"{_S}.attn.to_out", Fraction(1, 4)),
}
_SD3 = {
    "x_embedder.proj": _one("pos_embed.proj"),
    "context_embedder": _one("context_embedder"),
    "t_embedder.mlp.0": _one("time_text_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": _one("time_text_embed.timestep_embedder.linear_2"),
    "y_embedder.mlp.0": _one("time_text_embed.text_embedder.linear_1"),
    "y_embedder.mlp.2": _one("time_text_embed.text_embedder.linear_2"),
    "joint_blocks.x_block.adaLN_modulation.1": _one(f"{_D}.norm1.linear"),
    "joint_blocks.x_block.attn.qkv": _three(f"{_D}.attn", *_QKV),
    "joint_blocks.x_block.attn.proj": _one(f"{_D}.attn.to_out.0"),
    "joint_blocks.x_block.attn2.qkv": _three(f"{_D}.attn2", *_QKV),
    "joint_blocks.x_block.attn2.proj": _one(f"{_D}.attn2.to_out.0"),
    "joint_blocks.x_block.mlp.fc1": _one(f"{_D}.ff.net.0.proj"),
    "joint_blocks.x_block.mlp.fc2": _one(f"{_D}.ff.net.2"),
    # Six of them; in the last block, after which the prompt is of no use, shift and scale alone.
    "joint_blocks.context_block.adaLN_modulation.1": _one(
        f"{_D}.norm1_context.linear", 6, 2, swaps=True
    ),
    "joint_blocks.context_block.attn.qkv": _three(f"{_D}.attn", *_ADDED),
    "joint_blocks.context_block.attn.proj": _one(f"{_D}.attn.to_add_out"),
    "joint_blocks.context_block.mlp.fc1": _one(f"{_D}.ff_context.net.0.proj"),
    "joint_blocks.context_block.mlp.fc2": _one(f"{_D}.ff_context.net.2"),
    "final_layer.adaLN_modulation.1": _one("norm_out.linear", 2, swaps=True),
    "final_layer.linear": _one("proj_out"),
}
_LAST, _FIRST = "all_final_layer.2-1", "all_x_embedder.2-1"
# Beside the original names there are files with all of diffusers'.
_ZIMAGE = {
    "x_embedder": _one(_FIRST),
    "final_layer.adaLN_modulation.1": _one(f"{_LAST}.adaLN_modulation.1"),
    "final_layer.linear": _one(f"{_LAST}.linear"),
} | {
    name: _one(name)
    for name in (
        *(_FIRST, f"{_LAST}.adaLN_modulation.1", f"{_LAST}.linear"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
    )
}
_ZIMAGE_BLOCKS = ("layers", "noise_refiner", "context_refiner")
for _block in _ZIMAGE_BLOCKS:
    _ZIMAGE[f"{_block}.attention.qkv"] = _three(f"{_block}.{{}}.attention", *_QKV)
    _ZIMAGE[f"{_block}.attention.out"] = _one(f"{_block}.{{}}.attention.to_out.0")
    for _name in (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
    ):
        _ZIMAGE[f"{_block}.{_name}"] = _one(f"{_block}.{{}}.{_name}")
# Every layer is one of diffusers. The names are those of ComfyUI's map (comfy/utils.py,
# krea2_to_diffusers) and of diffusers' converter of LoRA files.
_KREA2 = {
    "first": _one("img_in"),
    "tmlp.0": _one("time_embed.linear_1"),
    "tmlp.2": _one("time_embed.linear_2"),
    "tproj.1": _one("time_mod_proj"),
    "txtmlp.1": _one("txt_in.linear_1"),
    "txtmlp.3": _one("txt_in.linear_2"),
    "txtfusion.projector": _one("text_fusion.projector"),
    "last.linear": _one("final_layer.linear"),
}
_KREA2_BLOCKS = {
    "blocks": "transformer_blocks",
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
}
for _block, _here in _KREA2_BLOCKS.items():
    for _name, _layer in (
        *(("attn.wq", "to_q"), ("attn.wk", "to_k"), ("attn.wv", "to_v")),
        *(("attn.gate", "to_gate"), ("attn.wo", "to_out.0")),
    ):
        _KREA2[f"{_block}.{_name}"] = _one(f"{_here}.{{}}.attn.{_layer}")
    for _name in ("gate", "up", "down"):
        _KREA2[f"{_block}.mlp.{_name}"] = _one(f"{_here}.{{}}.ff.{_name}")

_Tables = dict[str, dict[str, _Place]]
_FLUXES: _Tables = {"FLUX.1": _FLUX1, "FLUX.2": _FLUX2}
_ZIMAGES: _Tables = {"Z-Image": _ZIMAGE}
_KREA2S: _Tables = {"Krea 2": _KREA2}
# Diffusers' names, of any network that has them.
_AS_HERE: _Tables = {}
# Of which networks a file may be, by the names of its blocks.
_NETWORKS: dict[str, _Tables] = {
    **dict.fromkeys(("double_blocks", "single_blocks"), _FLUXES),
    "joint_blocks": {"Stable Diffusion 3": _SD3},
    **dict.fromkeys(_ZIMAGE_BLOCKS, _ZIMAGES),
    **dict.fromkeys(_KREA2_BLOCKS, _KREA2S),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), _AS_HERE),
}
_NUMBERED = re.compile(rf"({'|'.join(_NETWORKS)})\.([0-9]+)\.(.+)")
# The same for kohya's names, of the tables alone: their names differ without the dots too.
_FLAT_BLOCKS = {name.replace(".", "_"): name for name, tables in _NETWORKS.items() if tables}
_FLAT_NUMBERED = re.compile(rf"({'|'.join(_FLAT_BLOCKS)})_([0-9]+)_(.+)")
_DOTTED = {
    name.replace(".", "_"): name
    for tables in _NETWORKS.values()
    for table in tables.values()
    for name in table
}


def in_diffusers(layers: Layers, prefix: str, file: Path) -> dict[str, Factors]:
    """Return the layers of a file with ComfyUI's or kohya's names by diffusers' names.

    Args:
        layers: By the names in the file, without the prefix.
        prefix: `COMFYUI` or `KOHYA`.
        file: For messages.

    Raises:
        AssetError: If the network is not known or cannot be told, or has no such layer.
    """
    if prefix == KOHYA:
        layers = {_dotted(name): factors for name, factors in layers.items()}
    # 1. Of which network.
    found = [_NETWORKS[first] for n in layers if (first := n.split(".")[0]) in _NETWORKS]
    if not found or any(tables is not found[0] for tables in found):
        some = shown(", ".join(_in_file(name, prefix) for name in sorted(layers)))
        what = "several networks" if found else "a network that is not known here"
        unets = "Stable Diffusion 1.x, 2.x, SDXL, " if prefix == KOHYA else ""
        raise AssetError(
            f"{file}: the layers have {WHOSE[prefix]} names, of {what} ({some})",
            hint=f"files of {unets}FLUX.1, FLUX.2, Stable Diffusion 3, Z-Image and Krea 2 are read",
        )
    # 2. Names and shapes say which of those that share names.
    tables = found[0]
    misfits = {kind: _misfits(layers, table) for kind, table in tables.items()}
    nowhere = [n for n in layers if all(n in names for names in misfits.values())]
    if not tables:
        nowhere = [n for n in layers if not is_transformers(n)]
    if nowhere:
        layer = shown(_in_file(nowhere[0], prefix))
        raise AssetError(
            f"{file}: cannot be read as a LoRA: unexpected layer {layer} of shape "
            f"{layers[nowhere[0]].shape}, which is no layer of "
            f"{' or '.join(tables) or 'a transformer in diffusers'}"
        )
    if not tables:
        return dict(layers)
    fitting = [table for kind, table in tables.items() if not misfits[kind]]
    made = [_renamed(layers, table, prefix, file) for table in fitting]
    # 3. Where nothing tells them apart, it must make no difference.
    if not made or any(one.keys() != made[0].keys() for one in made):
        first, second = tables
        why = f"nothing shows whether it is of {first} or of {second}"
        if not made:
            odd = (min(misfits[kind]) for kind in (second, first))
            one, other = (shown(_in_file(name, prefix)) for name in odd)
            why = f"{one} is of {first}, {other} of {second}"
        raise AssetError(f"{file}: the layers have {WHOSE[prefix]} names, and {why}")
    return made[0]


def _dotted(flat: str) -> str:
    """Return kohya's name of a layer with its dots; what no table has, keeps its _."""
    found = _FLAT_NUMBERED.fullmatch(flat)
    if found is None:
        return _DOTTED.get(flat, flat)
    block, number, rest = found.groups()
    known = _DOTTED.get(f"{block}_{rest}", f"{_FLAT_BLOCKS[block]}.{rest}")
    block = _FLAT_BLOCKS[block]
    return f"{block}.{number}.{known.removeprefix(f'{block}.')}"


def _in_file(name: str, prefix: str) -> str:
    """Return the name of a layer as it is in the file."""
    return prefix + (name.replace(".", "_") if prefix == KOHYA else name)


def _place(name: str, table: dict[str, _Place]) -> tuple[_Place | None, str]:
    """Return the place of a layer, and the number of its block."""
    found = _NUMBERED.fullmatch(name)
    if found is not None:
        return table.get(f"{found[1]}.{found[3]}"), found[2]
    return None if name.split(".")[0] in _NETWORKS else table.get(name), ""


def _misfits(layers: Layers, table: dict[str, _Place]) -> set[str]:
    """Return the names of the layers that the table does not have, or in other shapes."""
    places = {name: _place(name, table)[0] for name in layers}
    return {n for n, place in places.items() if place is None or not place.fits(layers[n])}


def _renamed(
    layers: Layers, table: dict[str, _Place], prefix: str, file: Path
) -> dict[str, Factors]:
    made: dict[str, Factors] = {}
    origin: dict[str, str] = {}
    for name, factors in layers.items():
        place, number = _place(name, table)
        assert place is not None
        for pattern, part in zip(place.names, place.parts(factors), strict=True):
            new = pattern.format(number)
            if new in made:
                both = " and ".join(_in_file(n, prefix) for n in (origin[new], name))
                raise AssetError(f"{file}: has two layers for {new}: {both}")
            made[new], origin[new] = part, name
    return made
