"""The network of the embedded flow model before training, and the optimizers that train it."""

from __future__ import annotations

import math

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

MUON_RATE = 8e-3
ADAMW_RATE = 2e-3
# Cells to the right and down at which the heads of a block look at first; blocks take turns.
_NEIGHBOURS = (
    ((1, 0), (-1, 0), (0, 1), (0, -1)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
)
# Wave lengths of the position table that this uses for each axis: 6.3, 9.2 and 13.5 cells.
_WAVES = 3
# Factor of queries and keys: about half of a head's attention is on one cell.
_SHARPNESS = 2.5


def new_transformer() -> SD3Transformer2DModel:
    """Return an untrained transformer of 1.0 M parameters.

    As those of DiT (arXiv:2212.09748, section 3.2), all blocks are the identity and the prediction
    is zero. Attention starts as a convolution would: see `look_at_neighbours`.
    """
    network = SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=24,
        caption_projection_dim=96,
        joint_attention_dim=192,  # both text encoders side by side
        pooled_projection_dim=192,
        pos_embed_max_size=6,
    )
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    modulations = [layer for name, layer in network.named_modules() if name.endswith(".linear")]
    for layer in (*modulations, network.proj_out):
        torch.nn.init.zeros_(layer.weight)
    look_at_neighbours(network)
    return network


@torch.no_grad()
def look_at_neighbours(network: SD3Transformer2DModel) -> None:
    """Let each head of a transformer start with its attention on one neighbour of each patch.

    The position table holds sin(w x) and cos(w x), and the same of y. A query of sin(w (x + 1))
    and cos(w (x + 1)), which are linear in those, fits best the key at x + 1. So a head needs not
    find out first where a patch's neighbours are (the idea of ConViT, arXiv:2103.10697).
    """
    quarter = network.inner_dim // 4
    # 1. The features that tell the position hold nothing else.
    positions = [part * quarter + wave for part in range(4) for wave in range(_WAVES)]
    network.pos_embed.proj.weight[positions] = 0.0
    network.pos_embed.proj.bias[positions] = 0.0
    # 2. The norm before the attention takes a mean off, which is much the same for all patches.
    size, channels = network.config.sample_size, network.config.in_channels
    noise = torch.randn(64, channels, size, size, generator=torch.Generator().manual_seed(0))
    embedded = network.pos_embed(noise)
    mean = (embedded.mean(dim=-1) / embedded.std(dim=-1)).mean()
    width = network.config.attention_head_dim
    for number, block in enumerate(network.transformer_blocks):
        for head, offset in enumerate(_NEIGHBOURS[number % len(_NEIGHBOURS)]):
            for layer, shift in ((block.attn.to_q, offset), (block.attn.to_k, (0, 0))):
                rows = slice(head * width, head * width + 4 * _WAVES)
                layer.weight[head * width : (head + 1) * width] *= 0.5
                layer.weight[rows] = _SHARPNESS * _shifted(quarter, shift)
                layer.bias[rows] = mean * layer.weight[rows].sum(dim=1)


def _shifted(quarter: int, offset: tuple[int, int]) -> Tensor:
    """Return the matrix that leads from the position table to a few waves of it, shifted.

    Args:
        quarter: Waves of the table: it holds sin(w x), cos(w x), sin(w y), cos(w y), each so often.
        offset: Cells in x and y.
    """
    matrix = torch.zeros(4 * _WAVES, 4 * quarter)
    row = 0
    for axis, cells in enumerate(offset):
        for wave in range(_WAVES):
            angle = cells / 10_000 ** (wave / quarter)
            sine = 2 * axis * quarter + wave
            cosine = sine + quarter
            matrix[row, sine], matrix[row, cosine] = math.cos(angle), math.sin(angle)
            matrix[row + 1, sine], matrix[row + 1, cosine] = -math.sin(angle), math.cos(angle)
            row += 2
    return matrix


class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for all other parameters, as one optimizer.

    Muon (torch.optim.Muon, https://kellerjordan.github.io/posts/muon/) reached the loss of AdamW in
    a third of the samples.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        named = list(network.named_parameters())
        inside = [p for name, p in named if p.ndim == 2 and "transformer_blocks" in name]
        chosen = {id(parameter) for parameter in inside}
        others = [parameter for _, parameter in named if id(parameter) not in chosen]
        self._optimizers = (
            torch.optim.Muon(
                inside, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, lr=ADAMW_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
            ),
        )

    def set_rate(self, share: float) -> None:
        """Set both learning rates to a share of their full values."""
        for optimizer, rate in zip(self._optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * rate

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Change all parameters."""
        for optimizer in self._optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, object]:
        """Return the states of both."""
        return {"muon": self._optimizers[0].state_dict(), "adamw": self._optimizers[1].state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Take what `state_dict` returned."""
        for optimizer, name in zip(self._optimizers, ("muon", "adamw"), strict=True):
            optimizer.load_state_dict(state[name])
