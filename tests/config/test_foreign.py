"""Options of other tools: named in the message and in docs/coming-from.md as they are here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from alignprop_cli.config.foreign import ALIGNPROP, FLOWBP, TOOLS, TRL, _find
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards.catalogue import SHIPPED

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"

# Every option of each tool, read from its code at the commits that foreign.py names.
OPTIONS = {
    # The fields of the dataclass, of TRL 0.11.0, 0.22.2 and 0.23.0 alike (push_to_hub is newer).
    "TRL's AlignPropConfig": """
        exp_name run_name seed log_with log_image_freq tracker_kwargs accelerator_kwargs
        project_kwargs tracker_project_name logdir num_epochs save_freq num_checkpoint_limit
        mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale
        train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2
        train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps
        train_max_grad_norm negative_prompts truncated_backprop_rand truncated_backprop_timestep
        truncated_rand_backprop_minmax push_to_hub""",
    # What the present dataclasses have beside these, and the ml_collections of the first code.
    "the AlignProp repository": """
        pretrained_model pretrained_revision use_lora
        reward_fn grad_scale loss_coeff aesthetic_target prompt_fn backprop_strategy backprop_kwargs
        eval_prompt_fn soup_inference save_freq resume_from resume_from_2 vis_freq max_vis_images
        only_eval run_name debug mixed_precision num_checkpoint_limit logdir seed num_epochs
        allow_tf32 visualize_train visualize_eval truncated_backprop truncated_backprop_rand
        truncated_backprop_minmax trunc_backprop_timestep grad_checkpoint same_evaluation
        sd_guidance_scale steps per_prompt_stat_tracking mixing_coef_1 pretrained.model
        pretrained.revision train.loss_coeff train.use_8bit_adam train.learning_rate
        train.adam_beta1 train.adam_beta2 train.adam_weight_decay train.adam_epsilon
        train.max_grad_norm train.total_samples_per_epoch train.num_gpus
        train.samples_per_epoch_per_gpu train.total_batch_size train.batch_size_per_gpu
        train.batch_size_per_gpu_available train.gradient_accumulation_steps
        train.data_loader_iterations""",
    # Its map of sections, in the longer of two spellings where it has two.
    "FlowBP": """
        trainer.name model.pretrained_model_name_or_path model.gradient_checkpointing
        model.master_weight_type model.use_ema model.ema_decay data.data_json_path data.num_latent_t
        data.cfg data.dataloader_num_workers train.seed train.train_batch_size
        train.train_sp_batch_size train.gradient_accumulation_steps train.max_train_steps
        train.checkpointing_steps train.output_dir train.allow_tf32 train.debug
        train.connector_dump_interval train.connector_dump_dir train.connector_wandb_interval
        train.connector_wandb_num_samples train.resume_from_checkpoint optimizer.learning_rate
        optimizer.weight_decay optimizer.lr_scheduler optimizer.lr_warmup_steps
        optimizer.lr_num_cycles optimizer.lr_power optimizer.max_grad_norm distributed.sp_size
        distributed.fsdp_sharding_startegy distributed.selective_checkpointing
        distributed.use_cpu_offload sampling.h sampling.w sampling.sampling_steps
        sampling.rollout_steps sampling.sampler_seed sampling.cfg_guidance reward.use_hpsv2
        reward.loss_grad_scale reward.loss_relu_clip leapalign.select_idx_seed leapalign.min_idx
        flowbp.max_idx flowbp.train_step_tail_ratio flowbp.alpha flowbp.tau flowbp.jk_sampling_mode
        flowbp.jk_dirichlet_alpha flowbp.jk_dirichlet_alpha_a flowbp.jk_dirichlet_alpha_b
        flowbp.jk_dirichlet_alpha_c flowbp.jk_dirichlet_max_j_rev refl.refl_last_n_steps
        flowbp-sparse.flowbp_sparse_num_active_steps flowbp_sparse.flowbp_sparse_late_bias
        flowbp_sparse.flowbp_sparse_grad_rescale flowbp-bridge.alpha drtune.drtune_num_train_steps
        drtune.drtune_early_stop_steps drtune.drtune_early_stop_ratio
        draft_lv.draft_lv_num_noised_samples flowbp-lagrange.alpha flowbp_lagrange.connector_order
        logging.project logging.run_name flux2.max_sequence_length flux2.text_encoder_out_layers
        flux2.caption_key flux2.use_precomputed_embeds flux2.cfg_grad_norm_compensate
        flux2.cfg_detach_neg eval.prompts_file eval.num_imgs_per_prompt eval.seed eval.num_steps
        eval.guidance_scale eval.reward_fn eval.reward_ckpt_path eval.hpsv3_config_path
        eval.hpsv3_checkpoint_path eval.interval eval.evaluation_interval""",
}


def keys(section: type[BaseModel] = Config, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_named_exists_here(tool: str) -> None:
    for name, here in TOOLS[tool].items():
        for key in re.findall(r"`((?:{})\.\w+)`".format("|".join(Config.model_fields)), here):
            if key.startswith("reward."):
                assert key.removeprefix("reward.") in SHIPPED
                continue
            assert key in keys(), f"{name} is said to be {key}"


@pytest.mark.parametrize(
    ("title", "table"),
    [("TRL's", TRL), ("the AlignProp repository", ALIGNPROP), ("FlowBP", FLOWBP)],
)
def test_the_page_says_what_the_messages_say(title: str, table: dict[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## From [^\n]*{title}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section[0], re.MULTILINE))
    assert rows == dict(table)


@pytest.mark.parametrize("tool", OPTIONS)
def test_every_option_of_a_tool_is_told(tool: str) -> None:
    for option in OPTIONS[tool].split():
        # A section that is not here stands for all of its keys.
        said = _find(option, TOOLS[tool]) or _find(option.split(".")[0], TOOLS[tool])
        assert said, option
    # And none that it does not have.
    known = {option for option in OPTIONS[tool].split()}
    known |= {_short(option) for option in known} | {option.split(".")[0] for option in known}
    known |= {_short(option) for option in known}
    own = {"the AlignProp repository": ALIGNPROP}.get(tool, TOOLS[tool])
    assert not set(own) - known


def _short(option: str) -> str:
    """Return the shorter of two spellings of FlowBP."""
    section, dot, name = option.replace("-", "_").replace("leapalign", "flowbp").rpartition(".")
    return f"{section}{dot}{name.removeprefix(f'{section}_')}"


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"reward": {"aesthetic": None}, **values})
    problems = " ".join(str(problem) for problem in caught.value.problems)
    return f"{problems} {caught.value.hint}"


def test_a_file_of_trl_is_told_what_its_keys_are_here() -> None:
    said = message({"sample_num_steps": 50, "train_learning_rate": 1e-3, "num_epochs": 20})
    assert "In TRL's AlignPropConfig; here it is `sample.num_inference_steps`." in said
    assert "here it is `train.learning_rate`." in said
    assert "`train.steps` counts optimiser steps" in said
    assert "docs/coming-from.md" in said


def test_a_section_of_another_tool_is_told_key_by_key() -> None:
    said = message({"optimizer": {"learning_rate": 1e-5, "lr_warmup_steps": 0, "of_mine": 1}})
    assert "A section of FlowBP; here learning_rate is `train.learning_rate`" in said
    assert "lr_warmup_steps is `train.warmup_steps`" in said
    assert "of_mine" not in said


def test_other_spellings_of_flowbp_are_told_as_well() -> None:
    said = message({"refl": {"refl_last_n_steps": 5}, "leapalign": {"min_idx": 1}})
    assert "A section of FlowBP; here refl_last_n_steps is `gradient.span` of refl" in said
    assert "min_idx is `gradient.span`, in fractions of T" in said
    said = message({"flowbp-lagrange": {"alpha": 0.1}})
    assert "In FlowBP; here it is nothing: this method is not here" in said


def test_switches_of_flowbp_are_no_rewards() -> None:
    values = {"reward": {"use_hpsv2": True, "loss_relu_clip": 0.55}, "sampling": {"h": 512}}
    said = message(values)
    assert "'use_hpsv2' is no reward. In FlowBP; here it is `reward.hps`." in said
    assert "here it is `loss.kind`: hinge, with `loss.target`." in said


def test_a_key_within_a_section_of_both() -> None:
    said = message({"train": {"total_batch_size": 128}})
    assert "In the AlignProp repository; here it is `train.batch_size`." in said


def test_a_mistyped_key_is_still_a_mistyped_key() -> None:
    said = message({"train": {"learning_rte": 1.0}})
    assert "Did you mean 'learning_rate'?" in said
    assert "coming-from" not in said
