"""Model cards: what they say, and that nothing of a foreign text is markup in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from alignprop_cli.config import presets
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.publishing import card, facts, shared
from alignprop_cli.publishing.results import write_card
from alignprop_cli.rewards.catalogue import SHIPPED

ROOT = Path(__file__).parents[2]
PAIRED = {"base": 0.25, "tuned": 0.5, "difference": 0.25, "low": 0.125, "high": 0.375}
EVIL = (
    "<script>alert(1)</script>",
    "![x](http://evil.example/track.png)",
    "[click](javascript:alert(1)) http://evil.example www.evil.example",
    "a `code` and ``more`` of it`",
    "`",
    "a | b | c",
    "---\nlicense: mit\n---",
    "# heading\n\n- list\x1b[31m\u202e",
    "",
)


def summary(**more: Any) -> dict[str, Any]:
    return {
        "weights": "last step",
        "steps": 3,
        "guard": {"told": ""},
        "held_out": {
            "prompts": "shapes-heldout",
            "images": 4,
            "rewards": {"clip": PAIRED, "hps": PAIRED},
            "checker": {"colour": PAIRED},
        },
        **more,
    }


def of(model: str, examples: tuple[str, ...] = (), **flags: Any) -> card.Card:
    given = {"model.id": model, "reward.clip.model": "ViT-B-32", **flags}
    config = presets.resolve(preset="aesthetic", rewards={"clip": 2.0}, flags=given)
    return card.of_run(config, "r", "SomePipeline", "f1", summary(), examples)


def test_a_card_says_what_was_trained_and_measured() -> None:
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    text = of(model, ("a cat",)).text("me/r", "before_after.png")
    made = ModelCard(text)
    assert made.data.base_model == model
    assert made.data.license == "creativeml-openrail-m"
    assert made.data.library_name == "diffusers"
    assert made.data.pipeline_tag == "text-to-image"
    for expected in (
        f'SomePipeline.from_pretrained("{model}")',
        'pipeline.load_lora_weights("me/r")',
        "num_inference_steps=50",
        "| reward `clip` | weight 2 |",
        "| `clip` (trained on) | 0.2500 | 0.5000 | +0.2500 | +0.1250 to +0.3750 |",
        "| `hps` | 0.2500 |",
        "| `colour` right | 25.0% | 50.0% | +25.0% | +12.5% to +37.5% |",
        "4 images of held-out prompts (`shapes-heldout`)",
        "- `a cat`",
        "](before_after.png)",
        "- `clip`: fooled by texture that only this model sees.",
        f"- base model `{model}`: CreativeML OpenRAIL-M",
        "arXiv:2310.03739",
    ):
        assert expected in made.text, expected


def test_what_a_killed_process_has_left_of_a_card_is_removed_at_once(tmp_path: Path) -> None:
    """Also where the run is resumed in the same minute; files of other names stay."""
    for name in (".README.md-12.unfinished", ".notes.md-12.unfinished"):
        (tmp_path / name).write_text("half")
    written = write_card(tmp_path, of("tiny"))
    assert written.read_text().startswith("---")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.md-12.unfinished", "README.md"]


def test_of_a_local_model_only_the_name_is_told() -> None:
    text = of("/data/secret/mine").text("x", None)
    assert "/data" not in text
    assert "a local model, `mine`" in text
    assert "FOLDER-OF-THE-BASE-MODEL" in text
    made = ModelCard(text)
    assert made.data.base_model is None
    assert made.data.license is None
    assert "not known here" in made.text


def test_a_soup_has_the_figures_of_its_evaluation_or_says_that_there_are_none() -> None:
    header = {"alignprop.base_model": "Tongyi-MAI/Z-Image"}
    members = [("a", 0.7), ("b", 0.3)]
    given = ("mix", header, members, ["clip", "/data/own.py:A"], "exact")
    text = card.of_soup(*given, {"sample": {"num_inference_steps": 7}}, None).text("x", None)
    assert "Nothing was measured." in text
    assert "num_inference_steps=7" in text
    assert "| member 1 | `0.7 x a` |" in text
    assert "- `own.py:A`: a reward of its user's own" in text
    assert ModelCard(text).data.license == "apache-2.0"
    tuned = {"mean": 0.5, "std": 0.1, "difference": 0.25, "low": 0.125, "high": 0.375}
    evaluation = {
        "images": 8,
        "prompts": "/data/prompts.txt",
        "sample": {"num_inference_steps": 9},
        "model": {"id": "/data/other"},
        "rewards": {"hps": {"base": {"mean": 0.25}, "tuned": tuned}},
    }
    text = card.of_soup(*given, {}, evaluation).text("x", "evaluation/sheet.png")
    assert "| `hps` | 0.2500 | 0.5000 | +0.2500 | +0.1250 to +0.3750 |" in text
    # Its members' prompts are recorded nowhere, so nothing is said to be held out.
    assert "8 images of prompts (`prompts.txt`; whether members were trained on them is" in text
    assert "num_inference_steps=9" in text
    # These images are not of the model that the members record.
    assert "`Sampled with other.`" in text
    assert "/data" not in text


def test_the_code_of_a_card_leaves_t5_out_where_the_run_did() -> None:
    config = presets.resolve(preset="sd35_hps", flags={"model.t5": "none"})
    run = card.of_run(config, "r", "StableDiffusion3Pipeline", "f1", summary(), ())
    given = ("mix", {"alignprop.base_model": config.model.id}, [("a", 1.0)], ["hps"], "exact")
    mix = card.of_soup(*given, config.model_dump(mode="json"), None)
    for found in (run, mix):
        text = found.text("x", None)
        assert f'("{config.model.id}", text_encoder_3=None, tokenizer_3=None)' in text
    config = presets.resolve(preset="sd35_hps")
    run = card.of_run(config, "r", "StableDiffusion3Pipeline", "f1", summary(), ())
    # What a mix records may be somebody else's.
    for found in (run, *(card.of_soup(*given, {"model": m}, None) for m in ("none", {}, ["t5"]))):
        assert f'from_pretrained("{config.model.id}")' in found.text("x", None)


def test_revision_and_variant_of_the_base_model_are_told_and_loaded() -> None:
    named = {"model.revision": "0a1b2c", "model.variant": "fp16"}
    run = of("owner/model", **named)
    given = ("mix", {"alignprop.base_model": "owner/model"}, [("a", 1.0)], ["clip"], "exact")
    section = {"id": "owner/model", "revision": "0a1b2c", "variant": "fp16"}
    for found in (run, card.of_soup(*given, {"model": section}, None)):
        text = found.text("x", None)
        assert 'from_pretrained("owner/model", revision="0a1b2c", variant="fp16")' in text
        assert "| revision of the base model | `0a1b2c` |" in text
        assert "| variant of the base model | `fp16` |" in text
    # Neither where it was not named, of a single file, or not a text, as in somebody else's mix.
    alone = of("/data/mine.safetensors", **{"model.variant": "fp16"})
    odd = {"id": ["x"], "revision": 3, "variant": {"a": "b"}}
    for found in (of("owner/model"), alone, card.of_soup(*given, {"model": odd}, None)):
        text = found.text("x", None)
        assert not re.search("revision|variant", text)
    assert 'from_pretrained("owner/model")' in of("owner/model").text("x", None)


@pytest.mark.parametrize(
    "sample",
    [["x"], "x", {"guidance_scale": "7"}, {"true_guidance_scale": None}, {"height": {}, "own": 1}],
)
def test_a_header_of_somebody_else_with_an_impossible_sample_section_is_no_crash(sample) -> None:
    given = ("mix", {}, [("a", 1.0)], ["clip"], "exact", {"sample": sample})
    assert "pipeline(" in card.of_soup(*given, None).text("x", None)


def test_a_reward_in_a_file_is_marked_as_trained_on_and_named_without_its_folder() -> None:
    own = "/data/secret/own.py:Reward"
    told = f"{own} rose from 1 to 2 while held-out hps fell from 2 to 1"
    metrics = {own: PAIRED, "hps": PAIRED}
    found = summary(guard={"told": told})
    found["held_out"] = {**found["held_out"], "rewards": metrics}
    config = presets.resolve(preset="tiny", rewards={own: 1.0})
    prompts = ("a cat", "a dog", "a cat")
    made = card.of_run(config, "r", "SomePipeline", "f1", found, prompts, {"a dog", "a cow"})
    text = made.text("me/r", None)
    assert "/data" not in text
    assert "| `own.py:Reward` (trained on) | 0.2500 |" in text
    assert "`own.py:Reward rose from 1 to 2 while" in text
    # Prompts that were trained on are not held out, and that is said.
    assert "`1 of the 2 prompts of these images were trained on.`" in text


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_in_a_foreign_text_is_markup(evil: str) -> None:
    """By markdown-it, with tables, links and HTML as the hub has them."""
    parser = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    honest = vars(of("tiny", ("a cat",)))

    def with_text(text: str) -> card.Card:
        given = {"title": text, "examples": [text], "remarks": [text], "base": f"/x/{text}"}
        rewards, settings = {f"m:{text}": "weight 1"}, [("prompts", text)]
        return card.Card(**{**honest, **given, "rewards": rewards, "settings": settings})

    hostile, plain = with_text(evil), with_text("t")

    def kinds(made: card.Card) -> list[str]:
        body = ModelCard(made.text("x", None)).text
        tokens = parser.parse(body)
        inner = [child for token in tokens for child in token.children or ()]
        return [token.type for token in (*tokens, *inner) if token.type != "text"]

    # The same headings, tables, code and links, in the same order, whatever the text is.
    found = kinds(hostile)
    assert found == (kinds(plain) if evil else found)
    assert not {"html_block", "html_inline", "image"} & set(found)
    assert ModelCard(hostile.text("x", None)).data.to_dict() == (
        ModelCard(plain.text("x", None)).data.to_dict()
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", hostile.text("x", None))


def test_the_facts_about_rewards_are_those_of_the_documentation() -> None:
    assert set(facts.REWARDS) == set(SHIPPED)
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name in ("aesthetic", "hps", "imagereward", "clip"):
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        said = " ".join(re.search(r"\*\*Fooled by\*\*: (.*?)\.\n", section, re.DOTALL)[1].split())
        assert facts.REWARDS[name].fooled_by == said
        licence = facts.REWARDS[name].licence
        if name != "clip":
            assert licence is not None
            assert "Apache-2.0" in licence
            assert "Apache-2.0" in section
    for name, ends in re.findall(r"\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", text):
        assert facts.REWARDS[name].fooled_by == ends.strip()


def test_a_licence_is_told_of_published_models_alone() -> None:
    known = {model for model in PUBLISHED if facts.base_licence(model)}
    assert known >= {"Tongyi-MAI/Z-Image", "black-forest-labs/FLUX.1-dev"}
    assert facts.base_licence("somebody/else") is None
    assert facts.base_licence(None) is None


def test_two_rewards_of_the_same_name_in_two_folders_are_two_rows() -> None:
    one, two = "/data/a/own.py:Reward", "/data/b/own.py:Reward"
    second = {**PAIRED, "tuned": 0.75, "difference": 0.5}
    told = f"{one} rose from 1 to 2, {two} rose from 3 to 4"
    found = summary(guard={"told": told})
    found["held_out"] = {**found["held_out"], "rewards": {one: PAIRED, two: second}}
    config = presets.resolve(preset="tiny", rewards={one: 1.0, two: 0.5})
    text = card.of_run(config, "r", "SomePipeline", "f1", found, ()).text("me/r", None)
    for expected in (
        "| reward `own.py:Reward` | weight 1 |",
        "| reward `own.py:Reward (2)` | weight 0.5 |",
        "| `own.py:Reward` (trained on) | 0.2500 | 0.5000 |",
        "| `own.py:Reward (2)` (trained on) | 0.2500 | 0.7500 |",
        "own.py:Reward rose from 1 to 2, own.py:Reward (2) rose from 3 to 4",
    ):
        assert expected in text, expected
    assert "/data" not in text
    # What the second is called now is what the first is called here.
    told = f"{two} rose from 3 to 4, own.py:Reward fell from 2 to 1"
    found = {**found, "guard": {"told": told}}
    config = presets.resolve(preset="tiny", rewards={two: 1.0, "own.py:Reward": -1.0})
    text = card.of_run(config, "r", "SomePipeline", "f1", found, ()).text("me/r", None)
    assert "own.py:Reward rose from 3 to 4, own.py:Reward (2) fell from 2 to 1" in text
    assert "raise" not in text
    # A soup of both, and what may be told in the header of a file.
    given = ("mix", {}, [("a", 0.5), ("b", 0.5)], [one, two], "exact", {}, None)
    assert "| reward `own.py:Reward (2)` | of a member |" in card.of_soup(*given).text("x", None)
    header = shared.header({"alignprop.rewards": f"clip,{one},{two}"})
    assert header["alignprop.rewards"] == "clip,own.py:Reward,own.py:Reward (2)"


def test_a_folder_that_is_called_like_a_hub_id_is_never_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published = "Tongyi-MAI/Z-Image"
    assert ModelCard(of(published).text("x", None)).data.base_model == published
    (tmp_path / published).mkdir(parents=True)
    assert ModelCard(of(published).text("x", None)).data.base_model is None
    # Mixed elsewhere, where no such folder is: the LoRA itself says it.
    monkeypatch.chdir(Path("/"))
    header = {"alignprop.base_model": published, "alignprop.base_is_local": "true"}
    text = card.of_soup("mix", header, [("a", 1.0)], ["clip"], "exact", {}, None).text("x", None)
    assert ModelCard(text).data.base_model is None
    assert "a local model, `Z-Image`" in text
    assert "alignprop.base_model" not in shared.header(header)
    del header["alignprop.base_is_local"]
    assert shared.header(header)["alignprop.base_model"] == published
