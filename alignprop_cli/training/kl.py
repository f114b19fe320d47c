"""The KL penalty of DRaFT+: what the LoRA changes in the predictions that carry gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from alignprop_cli.guidance import Denoise
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step
from alignprop_cli.training.batches import Settings
from alignprop_cli.training.optimizer import Optimizer


class Penalty:
    """Adds weight x KL to the loss of one batch along one path, and measures the KL.

    KL = mean over the path's calls i and over the elements (C, h, w) of (epsilon_i - epsilon'_i)^2,
    of each image. epsilon_i is what the guided prediction of call i implies for the noise, and
    epsilon'_i what the base model's, made at the same input, does. Of a rectified flow the
    velocities are compared: at pure noise they say nothing about the noise.

    The gradient goes through epsilon_i, and through its input as far as the path's inputs are
    attached. The base model's prediction is a constant. With n copies the mean is over them too.

    Args:
        network: Holds the LoRA, which is switched off for the base model's predictions.
        prediction_type: What the network predicts, see `NoiseSchedule`.
        weight: Of each image's KL in the scalar whose gradient is computed, any loss scale
            included; 0 makes no extra call.

    Source: NVIDIA/NeMo-Aligner, megatron_sd_draftp_model.py (`kl_coeff`), with the same mean, the
        same guided predictions, and the graph of the chain attached.
    """

    def __init__(
        self, network: torch.nn.Module, prediction_type: PredictionType, weight: float
    ) -> None:
        self._network, self._weight = network, weight
        self._type: PredictionType = prediction_type
        # By place and step of the input. It is held, so that no other tensor can get its place.
        self._base: dict[tuple[int, Step], tuple[Tensor, Tensor]] = {}
        self._calls: list[Tensor] = []

    def around(self, denoise: Denoise) -> Denoise:
        """Return the same call, whose output gets the penalty's gradient in backward."""
        if not self._weight:
            return denoise

        def penalised(latents: Tensor, step: Step) -> Tensor:
            # 1. The base model's prediction, once: a recomputed call comes again in backward.
            key = (latents.data_ptr(), step)
            if is_new := key not in self._base:
                with torch.no_grad(), lora.disabled(self._network):
                    self._base[key] = latents.detach(), denoise(latents, step)
            noise_pred = denoise(latents, step)
            # 2. The difference in the noise that the two imply.
            factor = _noise_per_output(step, self._type)
            difference = factor * (noise_pred.detach() - self._base[key][1])  # (B, C, h, w)
            if is_new:
                self._calls.append(difference.square().flatten(1).mean(dim=1))
            # 3. d KL / d noise_pred, added to what comes back from the rewards. Only then is it
            #    known how many calls the mean is over.
            if noise_pred.requires_grad:
                scale = 2.0 * self._weight * factor / difference[0].numel()
                noise_pred.register_hook(lambda g: g + (scale / len(self._calls)) * difference)
            return noise_pred

        return penalised

    @property
    def values(self) -> Tensor | None:
        """Return the KL of each image, shape (B,), without gradient; None where it is not used."""
        return torch.stack(self._calls).mean(dim=0) if self._calls else None


def penalty_of(
    settings: Settings, model: Model, schedule: NoiseSchedule, optimizer: Optimizer
) -> Penalty:
    """Return the penalty for one batch of a step, a part of the mean over the global batch."""
    weight = settings.kl_weight * optimizer.scaler.get_scale() / settings.batch_size
    return Penalty(model.network.module, schedule.prediction_type, weight)


def _noise_per_output(step: Step, prediction_type: PredictionType) -> float:
    """Return d epsilon / d noise_pred at fixed latents; see `sampling.predict_x0_epsilon`."""
    if prediction_type == "v_prediction":
        return step.alpha
    if prediction_type == "sample":
        return -step.alpha / step.sigma
    return 1.0
