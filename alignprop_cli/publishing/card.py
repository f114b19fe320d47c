"""The model card: README.md beside an adapter, with what was measured and nothing else.

Names and prompts may be somebody else's: each is shown as code, in which no markdown, HTML or link
counts. The part in YAML is written by huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from alignprop_cli import __version__
from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.config.schema import Config
from alignprop_cli.models.usage import snippet
from alignprop_cli.publishing import facts, shared
from alignprop_cli.publishing.markdown import code, table

_TAGS = ["text-to-image", "lora", "diffusers", "reward-fine-tuning", "alignprop"]
_CITATION = """```bibtex
@article{prabhudesai2023aligning,
  title   = {Aligning Text-to-Image Diffusion Models with Reward Backpropagation},
  author  = {Prabhudesai, Mihir and Goyal, Anirudh and Pathak, Deepak and Fragkiadaki, Katerina},
  journal = {arXiv preprint arXiv:2310.03739},
  year    = {2023}
}
```"""


@dataclass(frozen=True)
class Figures:
    """What was measured, with and without the adapter.

    Args:
        images: Number of images of each.
        prompts: Which prompts, in words; in markdown.
        metrics: By name base, tuned, difference, low and high, as `evaluation.compare.Paired`.
        shares: The same of what a checker found right.
    """

    images: int
    prompts: str
    metrics: Mapping[str, Mapping[str, Any]]
    shares: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Args:
        title: Name of the run or the mix.
        about: One sentence: what it is.
        base: Id of the base model, as it is on this machine; None where it is not known.
        pipeline_class: The base model's pipeline in diffusers; None where it is not known.
        rewards: What it was trained on, each with its weight in words.
        settings: Names and values of what it was made with.
        sample: Values of the `sample` section.
        figures: What was measured; None where nothing was.
        remarks: What else belongs to the figures.
        examples: Some held-out prompts.
        fingerprint: Of the base model's architecture.
        base_is_local: Whether the base model is known to be a path, whatever it looks like.
        without_t5: Whether the base model is sampled without its T5.
        weights: `revision` and `variant` of the base model, where they were named.
    """

    title: str
    about: str
    base: str | None
    pipeline_class: str | None
    rewards: Mapping[str, str]
    settings: Sequence[tuple[str, str]]
    sample: Mapping[str, Any]
    figures: Figures | None = None
    remarks: Sequence[str] = ()
    examples: Sequence[str] = ()
    fingerprint: str | None = None
    base_is_local: bool = False
    without_t5: bool = False
    weights: Mapping[str, str] = field(default_factory=dict[str, str])

    def text(self, place: str, images: str | None) -> str:
        """Return the whole card.

        Args:
            place: Folder or hub id that diffusers loads the adapter from.
            images: Path of the before/after images from the card; None where there are none.
        """
        # 1. The part that the hub reads.
        base = shared.base_model(self.base, is_local=self.base_is_local)
        licence = facts.base_licence(base)
        named: dict[str, Any] = {"license": licence.id} if licence else {}
        named |= {"license_name": licence.name} if licence and licence.id == "other" else {}
        # An embedded model is on no hub.
        on_hub = base if base and "/" in base else None
        data = ModelCardData(
            base_model=on_hub,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=_TAGS,
            **named,
        )
        # 2. The part for people.
        parts = [
            f"# {code(self.title)}",
            f"{self.about} Base model: {_base(base, self.base)}.",
            *self._use(on_hub, place),
            *self._made(),
            *self._results(images),
            *self._limits(),
            *self._licence(base, licence),
            "## Citation",
            "The method:",
            _CITATION,
            f"Made with alignprop {__version__}.",
        ]
        text = "\n\n".join(parts)
        # Read back, so that what is no card is found here and not on the hub.
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").content

    def _use(self, base: str | None, place: str) -> list[str]:
        """Return how it is loaded and sampled with in diffusers."""
        named, t5 = self.pipeline_class, self.without_t5
        lines = snippet(base, named, place, self.sample, without_t5=t5, weights=self.weights)
        parts = ["## Use", "\n".join(["```python", *lines, "```"])]
        # What a call of diffusers' pipeline does not take.
        others = ("scheduler", "spacing", "eta", "guidance_interval")
        usual = {"scheduler": "model", "spacing": "model", "guidance_interval": [0.0, 1.0]}
        odd = {
            n: self.sample.get(n) for n in others if self.sample.get(n) not in (None, usual.get(n))
        }
        if odd:
            said = ", ".join(f"{name} {code(str(value))}" for name, value in odd.items())
            parts.append(f"The images here were sampled with other settings besides: {said}.")
        return parts

    def _made(self) -> list[str]:
        """Return rewards, prompts and settings."""
        # Rewards first: they are what the adapter is about.
        rows = [*((f"reward {code(n)}", w) for n, w in self.rewards.items())]
        rows += [(name, code(value)) for name, value in self.settings]
        rows += [(f"{n} of the base model", code(v)) for n, v in self.weights.items()]
        if self.fingerprint:
            rows.append(("architecture", code(self.fingerprint)))
        return ["## How it was made", table(("", ""), rows)]

    def _results(self, images: str | None) -> list[str]:
        """Return what was measured, and the images."""
        parts = ["## Results"]
        if self.figures is None:
            parts.append("Nothing was measured.")
        else:
            figures = self.figures
            parts.append(
                f"Means over {figures.images} images of {figures.prompts}, each from the same "
                "noise with the base model and with the adapter; the interval is of the "
                "difference, at 95 %."
            )
            columns = ("", "base", "adapter", "difference", "95 % interval")
            rows = [
                (self._metric(name), *_numbers(values, "{:.4f}"))
                for name, values in figures.metrics.items()
            ]
            rows += [
                (f"{code(name)} right", *_numbers(values, "{:.1%}"))
                for name, values in figures.shares.items()
            ]
            parts.append(table(columns, rows))
        # What the guard says; it may name rewards of others.
        parts += [code(remark, most=1000) for remark in self.remarks]
        if self.examples:
            parts.append("Some of the prompts:")
            parts.append("\n".join(f"- {code(prompt)}" for prompt in self.examples))
        if images is not None:
            parts.append(f"![Base model and adapter, side by side]({images})")
        return parts

    def _metric(self, name: str) -> str:
        return f"{code(name)}{' (trained on)' if name in self.rewards else ''}"

    def _limits(self) -> list[str]:
        """Return how the rewards are fooled."""
        lines = [
            "## Limits",
            "Every reward is only a model of what people want, and can be fooled. A higher number "
            "here is no proof of better images.",
        ]
        # Of a reward that is not shipped nothing is known, and that is said.
        known = ((name, facts.REWARDS.get(name)) for name in self.rewards)
        rows = [
            f"- {code(name)}: fooled by {fact.fooled_by}."
            if fact
            else f"- {code(name)}: a reward of its user's own; how it is fooled is not known."
            for name, fact in known
        ]
        return [*lines, "\n".join(rows)] if rows else lines

    def _licence(self, base: str | None, licence: facts.Licence | None) -> list[str]:
        """Return the licences of what the adapter is made from, where they are known."""
        # Nothing is guessed: a licence that is not in facts.py is not known.
        known = licence.name if licence else "not known here; see its page"
        rows = [f"- base model {_base(base, self.base)}: {known}"]
        for name in self.rewards:
            fact = facts.REWARDS.get(name)
            said = "not known" if fact is None else fact.licence or "none needed, it has no weights"
            rows.append(f"- reward {code(name)}: {said}")
        told = "What it is made from" + (
            " (the licence above is the base model's):" if licence else ":"
        )
        return ["## Licence", told, "\n".join(rows)]


def of_run(
    config: Config,
    title: str,
    pipeline_class: str,
    fingerprint: str,
    summary: Mapping[str, Any],
    examples: Sequence[str],
    trained_on: Collection[str] = (),
) -> Card:
    """Return the card of an adapter that was trained.

    Args:
        config: Of the run.
        title: Its name.
        pipeline_class: The base model's pipeline in diffusers.
        fingerprint: Of the base model.
        summary: What summary.json holds.
        examples: The prompts of the held-out images.
        trained_on: The prompts of the training.
    """
    train, lora, gradient = config.train, config.lora, config.gradient
    # A reward of a user's own is named by its file, whose folder is nobody else's affair.
    held_out, prompts = summary["held_out"], list(dict.fromkeys(examples))
    shown = shared.short_names((*config.reward, *config.eval.rewards, *held_out["rewards"]))
    weights = {shown[name]: f"weight {reward.weight:g}" for name, reward in config.reward.items()}
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    sample = config.sample.model_dump(mode="json")
    return Card(
        title=title,
        about=f"A {kind}, trained on {_list(weights)} by the gradient of the reward through the "
        "sampling chain.",
        base=config.model.id,
        pipeline_class=pipeline_class,
        rewards=weights,
        settings=[
            ("prompts", shared.last_part(config.train.prompts)),
            ("weights", str(summary["weights"])),
            ("steps", f"{summary['steps']} of {train.batch_size} images"),
            ("optimiser", f"{train.optimizer}, learning rate {train.learning_rate:g}"),
            ("adapter", f"{kind} of rank {lora.rank}, alpha {lora.alpha or lora.rank:g}"),
            ("gradient", _method(gradient)),
            ("loss", config.loss.kind),
            *([("KL to the base model", f"{train.kl_weight:g}")] if train.kl_weight else []),
            *_sampling(sample),
            ("base weights", "full" if config.model.quantize == "none" else config.model.quantize),
            ("seed", str(train.seed)),
        ],
        sample=sample,
        figures=Figures(
            held_out["images"],
            f"held-out prompts ({code(shared.last_part(held_out['prompts']))})",
            {shown[name]: values for name, values in held_out["rewards"].items()},
            held_out["checker"],
        ),
        remarks=_remarks(summary["guard"]["told"], shown, prompts, trained_on),
        examples=prompts[:5],
        fingerprint=fingerprint,
        without_t5=config.model.t5 == "none",
        weights=shared.named_weights(config.model.model_dump()),
    )


def of_soup(
    title: str,
    header: Mapping[str, str],
    members: Sequence[tuple[str, float]],
    rewards: Sequence[str],
    method: str,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> Card:
    """Return the card of a mix of adapters.

    Args:
        title: Its name.
        header: Of its file.
        members: Each with its share.
        rewards: What the members were trained on.
        method: How they are mixed.
        config: The configuration that the members record; may be empty.
        evaluation: What results.json holds; None where the mix was not evaluated.
    """
    measured = {} if evaluation is None else evaluation["rewards"]
    shown = shared.short_names((*rewards, *measured))
    sample, remarks = shared.sample(config.get("sample")), list[str]()
    # Somebody else's, as the sample section may be.
    found = config.get("model")
    model = cast(Mapping[str, Any], found) if isinstance(found, Mapping) else {}
    # An evaluation says how it sampled, which may be otherwise than the members record.
    figures = None
    if evaluation is not None:
        sample = evaluation["sample"]
        by_model = {shown[n]: m for n, m in measured.items() if "tuned" in m}
        figures = Figures(
            evaluation["images"],
            f"prompts ({code(shared.last_part(evaluation['prompts']))}; whether members were "
            "trained on them is not known)",
            {name: {"base": m["base"]["mean"], **m["tuned"]} for name, m in by_model.items()},
        )
        # With --model the images are another model's than the one that the members record.
        used = str(evaluation["model"]["id"])
        if used != header.get("alignprop.base_model"):
            remarks.append(f"Sampled with {shared.base_model(used) or shared.last_part(used)}.")
    return Card(
        title=title,
        about="A mix of LoRAs: each weight changes by the members' changes, each times its share.",
        base=header.get("alignprop.base_model"),
        pipeline_class=None,
        rewards=dict.fromkeys((shown[name] for name in rewards), "of a member"),
        settings=[
            *((f"member {i}", f"{c:g} x {name}") for i, (name, c) in enumerate(members, start=1)),
            ("method", method),
            *_sampling(sample),
        ],
        sample=sample,
        figures=figures,
        remarks=remarks,
        fingerprint=header.get("alignprop.base_fingerprint"),
        base_is_local=shared.is_local(header),
        without_t5=model.get("t5") == "none",
        weights=shared.named_weights(model),
    )


def _remarks(
    told: str | None,
    shown: Mapping[str, str],
    prompts: Collection[str],
    trained_on: Collection[str],
) -> list[str]:
    """Return what belongs to the figures of a run: the guard's words, and known prompts."""
    # Rewards in files are named without folders. In one go, and long ones first, as names overlap.
    names = "|".join(map(re.escape, sorted(shown, key=len, reverse=True)))
    found = [re.sub(names, lambda name: shown[name[0]], told)] if told else []
    # Without this the figures would claim to be about new prompts.
    if both := len(set(prompts) & set(trained_on)):
        found.append(f"{both} of the {len(prompts)} prompts of these images were trained on.")
    return found


def _base(known: str | None, given: str | None) -> str:
    """Return how a base model is called: a local one without its folders."""
    if known is not None:
        return code(known) if "/" in known else f"{code(known)} (shipped with alignprop)"
    return f"a local model, {code(shared.last_part(given))}" if given else "not recorded"


def _method(gradient: GradientConfig) -> str:
    # Of the other estimators the number of calls is drawn, or is not one number.
    calls = {"last_k": f", k = {gradient.k}"}.get(gradient.method, "")
    return f"{gradient.method}{calls}"


def _sampling(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings of sampling, of those that are known."""
    shown = {"num_inference_steps": "sampling steps", "guidance_scale": "guidance scale"}
    # A number as people write it: 7.5, and 50 rather than 50.0.
    found = [(title, f"{sample[n]:g}") for n, title in shown.items() if sample.get(n) is not None]
    if sample.get("height") and sample.get("width"):
        found.append(("image size", f"{sample['width']} x {sample['height']}"))
    return found


def _list(names: Mapping[str, str]) -> str:
    return ", ".join(map(code, names)) or "nothing"


def _numbers(values: Mapping[str, Any], form: str) -> tuple[str, ...]:
    """Return a row of the table of results."""
    # Differences with their sign, also where they are 0.
    signed = form.replace(":", ":+")
    low, high = signed.format(values["low"]), signed.format(values["high"])
    return (
        form.format(values["base"]),
        form.format(values.get("tuned", values.get("mean"))),
        signed.format(values["difference"]),
        f"{low} to {high}",
    )
