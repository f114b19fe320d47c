"""Options of other trainers by reward gradients, and what each is called here.

For the message about an unknown key, and for docs/coming-from.md, which a test holds against it.
Read from huggingface/trl at 0a49bca (trl/trainer/alignprop_config.py), mihirp1998/AlignProp at
45ab15c and a831a5f (config/), and RuoyuWang-2077/FlowBP at 34c93f9 (flowbp/config/flowbp.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

# What is said of several keys.
_ACCUMULATION = (
    "`train.batch_size` is the images of a whole step; how they are accumulated is planned"
)
_EPOCHS = "`train.steps` counts optimiser steps"
_TRUNCATION = "`gradient.method`: random_k, last_k or gaussian_k; k counts calls from the image"
_NONE = "nothing: "

TRL: Mapping[str, str] = {
    # Where a run goes, and what it shows.
    "exp_name": "`output.dir`",
    "run_name": "`output.dir`",
    "seed": "`train.seed`",
    "log_with": _NONE + "metrics.jsonl in the run folder",
    "log_image_freq": "`eval.every`",
    "tracker_kwargs": _NONE + "there are no trackers",
    "tracker_project_name": _NONE + "there are no trackers",
    "accelerator_kwargs": _NONE + "`accelerate launch` has its own options",
    "project_kwargs": _NONE + "`output.dir` is all",
    "logdir": "`output.dir`",
    # How long it takes, and what is kept.
    "num_epochs": _EPOCHS + " (TRL's example: one epoch is one step of 128 images)",
    "save_freq": "`output.save_every`, in steps",
    "num_checkpoint_limit": "`output.keep_last`",
    "mixed_precision": "`model.dtype`: float16, bfloat16 or float32",
    "allow_tf32": _NONE + "it is on wherever it changes nothing that matters",
    "resume_from": "the option --resume RUN",
    # The chain.
    "sample_num_steps": "`sample.num_inference_steps`",
    "sample_eta": "`sample.eta`",
    "sample_guidance_scale": "`sample.guidance_scale`",
    # The batch and the optimiser.
    "train_batch_size": _ACCUMULATION,
    "train_gradient_accumulation_steps": _ACCUMULATION,
    "train_use_8bit_adam": "`train.optimizer`: adamw8bit",
    "train_learning_rate": "`train.learning_rate`",
    "train_adam_beta1": "`train.adam_beta1`",
    "train_adam_beta2": "`train.adam_beta2`",
    "train_adam_weight_decay": "`train.weight_decay`",
    "train_adam_epsilon": "`train.adam_epsilon`",
    "train_max_grad_norm": "`train.max_grad_norm`",
    "negative_prompts": "`sample.negative_prompt`, one text",
    # Where the gradient begins. TRL counts from the noise, we from the image.
    "truncated_backprop_rand": _TRUNCATION,
    "truncated_backprop_timestep": "`gradient.k` of last_k: 50 - 49 is k = 1",
    "truncated_rand_backprop_minmax": "`gradient.k_min` and `gradient.k_max` of random_k: the "
    "range (0, 50) is k of 50 to 0",
    "push_to_hub": "the option --push-to-hub ID; a new repository is private",
}

ALIGNPROP: Mapping[str, str] = {
    # Reward, loss and prompts; its factor on the loss has two names.
    "reward_fn": "`reward`, by name: aesthetic or hps",
    "grad_scale": "`loss.scale`",
    "loss_coeff": "`loss.scale`",
    "aesthetic_target": "`loss.kind`: target, with `loss.target`",
    "prompt_fn": "`train.prompts`: animals or hpd",
    "eval_prompt_fn": "`eval.prompts`: animals-eval or hpd-eval",
    # Of the present code.
    "backprop_strategy": _TRUNCATION,
    "backprop_kwargs": "`gradient.mean` and `gradient.std` of gaussian_k are shares of T (42 of 50 "
    "is 0.84); `gradient.k` of last_k is 50 - value",
    # Of the first code, a file of ml_collections with sections.
    "steps": "`sample.num_inference_steps`; optimiser steps are `train.steps`",
    "sd_guidance_scale": "`sample.guidance_scale`",
    "pretrained.model": "`model.id`",
    "pretrained.revision": "`model.revision`",
    "truncated_backprop": _TRUNCATION,
    "truncated_backprop_minmax": "`gradient.k_min` and `gradient.k_max`: T - max and T - min",
    "trunc_backprop_timestep": "`gradient.k` of last_k: T - timestep",
    "grad_checkpoint": "`gradient.checkpoint_network`; auto recomputes what does not fit",
    # Evaluation and soups, which were modes of its one program.
    "only_eval": "the command alignprop evaluate",
    "same_evaluation": _NONE + "evaluations have fixed noise",
    "soup_inference": "the command alignprop soup",
    "resume_from_2": "the second checkpoint of alignprop soup",
    "mixing_coef_1": "the option --coef of alignprop soup",
    "vis_freq": "`eval.every`",
    "max_vis_images": "`eval.sample_images`",
    "visualize_train": _NONE + "fixed held-out prompts are shown",
    "visualize_eval": "`eval.every`",
    "debug": _NONE + "there are no trackers to switch off",
    "per_prompt_stat_tracking": _NONE + "it has no effect there either",
    # Its `train` section, whose other keys have our names.
    "train.loss_coeff": "`loss.scale`",
    "train.use_8bit_adam": "`train.optimizer`: adamw8bit",
    "train.adam_weight_decay": "`train.weight_decay`",
    "train.total_batch_size": "`train.batch_size`",
    "train.total_samples_per_epoch": _EPOCHS + "; an epoch there is 256 images, two steps",
    "train.batch_size_per_gpu_available": "`train.micro_batch`",
    "train.gradient_accumulation_steps": _ACCUMULATION,
}

FLOWBP: Mapping[str, str] = {
    # The run: its sections are ours under other names.
    "trainer.name": "`gradient.method`: leapalign is leap, flowbp_sparse is sparse",
    "model.pretrained_model_name_or_path": "`model.id`",
    "model.gradient_checkpointing": "`gradient.checkpoint_network`",
    "model.master_weight_type": "`model.dtype`; LoRA weights are float32",
    "model.use_ema": "`train.ema_decay`",
    "model.ema_decay": "`train.ema_decay`",
    "data.data_json_path": "`train.prompts`; embeddings are made at the start",
    "train.train_batch_size": _ACCUMULATION,
    "train.gradient_accumulation_steps": _ACCUMULATION,
    "train.max_train_steps": "`train.steps`",
    "train.checkpointing_steps": "`output.save_every`",
    "train.output_dir": "`output.dir`",
    "train.resume_from_checkpoint": "the option --resume RUN",
    "optimizer.learning_rate": "`train.learning_rate`; theirs is for all weights, not a LoRA",
    "optimizer.weight_decay": "`train.weight_decay`",
    "optimizer.lr_scheduler": "`train.lr_schedule`",
    "optimizer.lr_warmup_steps": "`train.warmup_steps`",
    "optimizer.max_grad_norm": "`train.max_grad_norm`",
    "distributed": _NONE + "each process has the whole model; `accelerate launch` starts them",
    # Roll-out and reward.
    "sampling.h": "`sample.height`",
    "sampling.w": "`sample.width`",
    "sampling.sampling_steps": "`sample.num_inference_steps`",
    "sampling.rollout_steps": "`sample.num_inference_steps`",
    "sampling.sampler_seed": "`train.seed`",
    "sampling.cfg_guidance": "`sample.guidance_scale`",
    "reward.use_hpsv2": "`reward.hps`",
    "reward.loss_relu_clip": "`loss.kind`: hinge, with `loss.target`",
    "reward.loss_grad_scale": "`loss.scale`",
    # Its estimators.
    "flowbp.alpha": "`gradient.alpha` of leap",
    "flowbp.tau": "`gradient.tau` of leap",
    "flowbp.min_idx": "`gradient.span`, in fractions of T",
    "flowbp.max_idx": "`gradient.span`, in fractions of T",
    "refl.last_n_steps": "`gradient.span` of refl: from 1 - n / T",
    "flowbp_sparse.num_active_steps": "`gradient.calls` of sparse",
    "flowbp_sparse.late_bias": "`gradient.late_bias` of sparse",
    "flowbp_sparse.grad_rescale": "`gradient.rescale` of sparse",
    "draft_lv.num_noised_samples": "`gradient.copies` of draft_lv",
    "drtune.num_train_steps": "`gradient.calls` of drtune",
    "drtune.early_stop_ratio": "`gradient.span` of drtune: from 1 - ratio",
    "flux2.cfg_detach_neg": "`gradient.detach_uncond`",
    "logging": _NONE + "metrics.jsonl in the run folder",
}

TOOLS: Mapping[str, Mapping[str, str]] = {
    "TRL's AlignPropConfig": TRL,
    "the AlignProp repository": {**TRL, **ALIGNPROP},
    "FlowBP": FLOWBP,
}


def named_here(key: str, value: Any) -> str | None:
    """Return what an unknown key of another tool is here, in words; None if no tool has it.

    Args:
        key: Dotted, as in the file.
        value: Its value: of a section that only the other tool has, every key is named.
    """
    # Tools share names; what the first one means by it is said.
    for tool, names in TOOLS.items():
        if key in names:
            return f" In {tool}; here it is {names[key]}."
        section = cast(Mapping[str, Any], value if isinstance(value, dict) else {})
        inside = [f"{key}.{name}" for name in section]
        if known := [name for name in inside if name in names]:
            said = "; ".join(f"{name.rpartition('.')[2]} is {names[name]}" for name in known)
            return f" A section of {tool}; here {said}."
    return None
