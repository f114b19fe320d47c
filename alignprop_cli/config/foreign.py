"""Options of other trainers by reward gradients, and what each is called here.

For the message about an unknown key, and for docs/coming-from.md, which a test holds against it.
Read from huggingface/trl at 0a49bca (trl/trainer/alignprop_config.py), mihirp1998/AlignProp at
45ab15c and a831a5f (config/), and RuoyuWang-2077/FlowBP at 93b220a (flowbp/config/flowbp.py).
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
_FOLLOWS = _NONE + "it follows from `train.batch_size` and the number of processes"
_SAME_SAMPLING = ", in training and evaluation alike"
_OF_LAGRANGE = _NONE + "of a method that is not here"
_TF32 = _NONE + "it is on wherever it changes nothing that matters"

TRL: Mapping[str, str] = {
    # Where a run goes, and what it shows.
    "exp_name": "`output.dir`",
    "run_name": "`tracking.run_name`; the folder is `output.dir`",
    "seed": "`train.seed`",
    "log_with": "the option --log-with; metrics.jsonl in the run folder in any case",
    "log_image_freq": "`eval.every`",
    "tracker_kwargs": "`tracking.tags`; the rest are the trackers' own environment variables",
    "tracker_project_name": "`tracking.project`",
    "accelerator_kwargs": _NONE + "`accelerate launch` has its own options",
    "project_kwargs": _NONE + "`output.dir` is all",
    "logdir": "`output.dir`",
    # How long it takes, and what is kept.
    "num_epochs": _EPOCHS + " (TRL's example: one epoch is one step of 128 images)",
    "save_freq": "`output.save_every`, in steps",
    "num_checkpoint_limit": "`output.keep_last`",
    "mixed_precision": "`model.dtype`: float16, bfloat16 or float32",
    "allow_tf32": _TF32,
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
    # Of the present code, main.py among it.
    "pretrained_model": "`model.id`",
    "pretrained_revision": "`model.revision`",
    "use_lora": _NONE + "a LoRA is always trained",
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
    "debug": _NONE + "without --log-with no tracker is told",
    "per_prompt_stat_tracking": _NONE + "it has no effect there either",
    # Its `train` section, of which some keys have our names.
    "train.learning_rate": "`train.learning_rate`",
    "train.adam_beta1": "`train.adam_beta1`",
    "train.adam_beta2": "`train.adam_beta2`",
    "train.adam_epsilon": "`train.adam_epsilon`",
    "train.max_grad_norm": "`train.max_grad_norm`",
    "train.loss_coeff": "`loss.scale`",
    "train.use_8bit_adam": "`train.optimizer`: adamw8bit",
    "train.adam_weight_decay": "`train.weight_decay`",
    "train.total_batch_size": "`train.batch_size`",
    "train.total_samples_per_epoch": _EPOCHS + "; an epoch there is 256 images, two steps",
    "train.batch_size_per_gpu_available": "`train.micro_batch`",
    "train.gradient_accumulation_steps": _ACCUMULATION,
    "train.num_gpus": _NONE + "`accelerate launch` has its own options",
    "train.batch_size_per_gpu": _FOLLOWS,
    "train.samples_per_epoch_per_gpu": _FOLLOWS,
    "train.data_loader_iterations": _FOLLOWS,
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
    "data.num_latent_t": _NONE + "an image has one frame",
    "data.cfg": _NONE + "prompts are never left out in training",
    "data.dataloader_num_workers": _NONE + "there is nothing to load during training",
    "train.seed": "`train.seed`",
    "train.train_batch_size": _ACCUMULATION,
    "train.gradient_accumulation_steps": _ACCUMULATION,
    "train.max_train_steps": "`train.steps`",
    "train.checkpointing_steps": "`output.save_every`",
    "train.output_dir": "`output.dir`",
    "train.resume_from_checkpoint": "the option --resume RUN",
    "train.train_sp_batch_size": _NONE + "no image is divided among processes",
    "train.allow_tf32": _TF32,
    "train.debug": "the option --debug",
    "train.connector_dump_interval": _NONE + "the latents of jumps are not written",
    "train.connector_dump_dir": _NONE + "the latents of jumps are not written",
    "train.connector_wandb_interval": _NONE + "the latents of jumps are not shown",
    "train.connector_wandb_num_samples": _NONE + "the latents of jumps are not shown",
    "optimizer.learning_rate": "`train.learning_rate`; theirs is for all weights, not a LoRA",
    "optimizer.weight_decay": "`train.weight_decay`",
    "optimizer.lr_scheduler": "`train.lr_schedule`",
    "optimizer.lr_warmup_steps": "`train.warmup_steps`",
    "optimizer.lr_num_cycles": "`train.lr_cycles`",
    "optimizer.lr_power": "`train.lr_power`",
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
    # Evaluation.
    "eval.prompts_file": "`eval.prompts`",
    "eval.num_imgs_per_prompt": "`eval.images_per_prompt`",
    "eval.seed": "`eval.seed`",
    "eval.num_steps": "`sample.num_inference_steps`" + _SAME_SAMPLING,
    "eval.guidance_scale": "`sample.guidance_scale`" + _SAME_SAMPLING,
    "eval.reward_fn": "`eval.rewards`",
    "eval.reward_ckpt_path": "options of each reward in `eval.rewards`",
    "eval.hpsv3_config_path": "options of hpsv3 in `eval.rewards`",
    "eval.hpsv3_checkpoint_path": "options of hpsv3 in `eval.rewards`",
    "eval.interval": "`eval.every`",
    "eval.evaluation_interval": "`eval.every`",
    # Its estimators.
    "flowbp.select_idx_seed": "`train.seed`, of all draws",
    "flowbp.train_step_tail_ratio": "`gradient.span`: from 1 - ratio",
    "flowbp.alpha": "`gradient.alpha` of leap",
    "flowbp.tau": "`gradient.tau` of leap",
    "flowbp.min_idx": "`gradient.span`, in fractions of T",
    "flowbp.max_idx": "`gradient.span`, in fractions of T",
    "flowbp.jk_sampling_mode": _OF_LAGRANGE,
    "flowbp.jk_dirichlet_alpha": _OF_LAGRANGE,
    "flowbp.jk_dirichlet_alpha_a": _OF_LAGRANGE,
    "flowbp.jk_dirichlet_alpha_b": _OF_LAGRANGE,
    "flowbp.jk_dirichlet_alpha_c": _OF_LAGRANGE,
    "flowbp.jk_dirichlet_max_j_rev": _OF_LAGRANGE,
    "flowbp_bridge": _NONE + "this method is not here; the nearest are leap and sparse",
    "flowbp_lagrange": _NONE + "this method is not here; the nearest is leap",
    "refl.last_n_steps": "`gradient.span` of refl: from 1 - n / T",
    "flowbp_sparse.num_active_steps": "`gradient.calls` of sparse",
    "flowbp_sparse.late_bias": "`gradient.late_bias` of sparse",
    "flowbp_sparse.grad_rescale": "`gradient.rescale` of sparse",
    "draft_lv.num_noised_samples": "`gradient.copies` of draft_lv",
    "drtune.num_train_steps": "`gradient.calls` of drtune",
    "drtune.early_stop_ratio": "`gradient.span` of drtune: from 1 - ratio",
    "drtune.early_stop_steps": "`gradient.span` of drtune: from 1 - steps / T",
    "flux2.cfg_detach_neg": "`gradient.detach_uncond`",
    "flux2.cfg_grad_norm_compensate": "`loss.scale`: 1 / guidance scale",
    "flux2.max_sequence_length": _NONE + "512 tokens, as the model was published",
    "flux2.text_encoder_out_layers": _NONE + "9, 18 and 27, as the model was published",
    "flux2.caption_key": "the column `prompt` of the file in `train.prompts`",
    "flux2.use_precomputed_embeds": _NONE + "embeddings are made at the start",
    "logging.project": "`tracking.project`",
    "logging.run_name": "`tracking.run_name`; the folder is `output.dir`",
}

# Sections that FlowBP also reads under other names.
_SPELLINGS = {
    "leapalign": "flowbp",
    "flowbp-sparse": "flowbp_sparse",
    "flowbp-bridge": "flowbp_bridge",
    "flowbp-lagrange": "flowbp_lagrange",
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
        if here := _find(key, names):
            return f" In {tool}; here it is {here}."
        section = cast(Mapping[str, Any], value if isinstance(value, dict) else {})
        inside = {name: _find(f"{key}.{name}", names) for name in section}
        if known := [f"{name} is {here}" for name, here in inside.items() if here]:
            return f" A section of {tool}; here {'; '.join(known)}."
    return None


def _find(key: str, names: Mapping[str, str]) -> str | None:
    """Return what a key is here, also where FlowBP spells its section or the key otherwise."""
    section, dot, name = key.rpartition(".")
    if not section:
        return names.get(_SPELLINGS.get(key, key))
    section = _SPELLINGS.get(section, section)
    # The name may repeat its section: `refl.refl_last_n_steps`.
    short = f"{section}{dot}{name.removeprefix(f'{section}_')}"
    return names.get(f"{section}{dot}{name}") or names.get(short)
