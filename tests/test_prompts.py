"""Prompt sets: built-in, from files, and which image gets which."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from alignprop_cli import benchmarks
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models.families import TINY
from alignprop_cli.prompts import (
    ANIMALS,
    ANIMALS_EVAL,
    BUILT_IN,
    MOST_CHARACTERS,
    PromptStream,
    count_prompts,
    cut_note,
    for_tokenizer,
    hashes,
    load_entries,
    load_prompts,
)
from alignprop_cli.rewards.detect import number_in
from alignprop_cli.rewards.hpsv3 import HpsV3Reward
from alignprop_cli.rewards.mixture import Member, Mixture
from alignprop_cli.rewards.vlm import VlmReward


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\n  two dogs \n"),
        ("p.txt", "\ufeffa cat\r\ntwo dogs"),
        ("p.jsonl", '"a cat"\n\n{"id": 1, "prompt": "two dogs"}\n'),
        ("p.jsonl", '{"text": "a cat"}\n{"caption": "two dogs"}'),
        ("p.json", '["a cat", {"prompt": " two dogs"}, ""]'),
        ("p.csv", "id,prompt\n1,a cat\n2,two dogs\n3,\n"),
        ("p.csv", "caption\r\na cat\r\n  two dogs\r\n"),
    ],
)
def test_prompts_are_read_from_files(tmp_path: Path, name: str, text: str) -> None:
    assert load_prompts(write(tmp_path / name, text)) == ["a cat", "two dogs"]


def test_only_a_line_feed_ends_a_prompt(tmp_path: Path) -> None:
    odd = "a cat\u2028and\x0ba dog\u0085"
    (tmp_path / "p.txt").write_text(f"{odd}\r\na bird\n", encoding="utf-8", newline="")
    assert load_prompts(str(tmp_path / "p.txt")) == [odd.strip(), "a bird"]
    (tmp_path / "p.csv").write_text(f"prompt,n\r\n{odd},1\r\na bird,2\r\n", newline="")
    assert load_prompts(str(tmp_path / "p.csv")) == [odd.strip(), "a bird"]


def test_a_quoted_field_of_a_table_may_hold_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'prompt,id\n"a cat, a ""big"" dog",1\n')
    assert load_prompts(path) == ['a cat, a "big" dog']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '"a"\n{broken', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '"a"\n\n{"title": "b"}', r"p\.jsonl:3: expected a text"),
        ("p.jsonl", "3", r"p\.jsonl:1: expected a text"),
        ("p.json", '{"prompt": "a"}', r"p\.json: expected a list of texts"),
        ("p.json", '["a", 3]', r"p\.json\[1\]: expected a text"),
        ("p.json", '["a"', r"p\.json: not JSON"),
        ("p.csv", "id,title\n1,a\n", "no column named prompt, text or caption"),
        ("p.csv", "", "no column named"),
        ("p.csv", "prompt\n", "holds no prompt"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompts(write(tmp_path / name, text))


def test_a_missing_or_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"nothing\.txt"):
        load_prompts(str(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(AssetError, match=r"latin\.txt"):
        load_prompts(str(tmp_path / "latin.txt"))


def test_an_unknown_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'animals'"):
        load_prompts("animal")


def test_the_styles_of_hpd_are_read_from_the_hub_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file: str, *, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return write(
            tmp_path / Path(file).name, json.dumps([f"{Path(file).stem} {i}" for i in (0, 1)])
        )

    monkeypatch.setattr(benchmarks, "hf_hub_download", download)
    assert load_prompts("hpd:concept-art") == ["concept-art 0", "concept-art 1"]
    assert asked == [("zhwang/HPDv2", "benchmark/concept-art.json", "dataset")]
    assert load_prompts("hpd")[::2] == ["anime 0", "concept-art 0", "paintings 0", "photo 0"]
    with pytest.raises(ConfigError, match="Did you mean 'anime'"):
        load_prompts("hpd:animes")


def test_prompts_of_the_hub_without_a_network_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"cannot load benchmark/photo\.json of the dataset"):
        load_prompts("hpd:photo")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("animals", 45),
        ("animals-eval", 6),
        ("dogs", 30),
        ("dogs-eval", 15),
        ("places", 18),
        ("places-eval", 6),
        ("shapes", 800),
        ("shapes-heldout", 160),
    ],
)
def test_built_in_sets_have_their_size_and_no_repeats(name: str, size: int) -> None:
    prompts = load_prompts(name)
    assert len(prompts) == len(set(prompts)) == size


def test_prompts_are_counted_once_and_without_the_hub() -> None:
    assert count_prompts(["dogs", "dogs-eval", "dogs"]) == len(
        {*load_prompts("dogs"), *load_prompts("dogs-eval")}
    )
    assert count_prompts(["hpd"]) == count_prompts(["hpd", "hpd:anime"]) == 3200
    assert count_prompts(["hpd:photo", "animals"]) == 845
    with pytest.raises(ConfigError, match="unknown style"):
        count_prompts(["hpd:pixel"])


def test_what_is_held_out_is_not_trained_on() -> None:
    names = list(BUILT_IN)
    for trained, held_out in zip(names[::2], names[1::2], strict=True):
        assert held_out.startswith(f"{trained}-")
        assert not set(load_prompts(trained)) & set(load_prompts(held_out))


def test_the_prompts_about_dogs_name_their_number() -> None:
    numbers = [number_in(prompt, "dog") for prompt in load_prompts("dogs")]
    assert sorted(set(numbers)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("file", "prompts"),
    [("simple_animals.txt", ANIMALS), ("eval_simple_animals.txt", ANIMALS_EVAL)],
)
def test_the_animals_are_those_of_the_published_lists(file: str, prompts: tuple[str, ...]) -> None:
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("ALIGNPROP_SHARED_DATA", beside)) / file
    if not path.is_file():
        pytest.skip(f"{file} is not here; set ALIGNPROP_SHARED_DATA to its folder")
    assert list(prompts) == [line.strip() for line in path.read_text().splitlines() if line.strip()]


def test_quotation_marks_of_a_prompt_stay(tmp_path: Path) -> None:
    # As spreadsheets write it, and as PartiPrompts is on its authors' page.
    lines = ["Prompt\tNote", '"G I G" in paint\t', 'the "HI" on a wall\tits "note"', '"a dog\tx']
    raw = write(tmp_path / "raw.tsv", "\n".join(lines))
    assert load_prompts(str(raw)) == ['"G I G" in paint', 'the "HI" on a wall', '"a dog']
    quoted = write(tmp_path / "q.tsv", 'Prompt\tNote\n"""G I G"" in paint"\tb\n"a\ttab"\t\n')
    assert load_prompts(str(quoted)) == ['"G I G" in paint', "a\ttab"]
    # In CSV it is a mistake: the first would lose its marks, the second be one with all after it.
    for text in ('"STOP" sign,1\na cat,2\n', '"a cat,1\na dog,2\n'):
        path = write(tmp_path / "p.csv", f"prompt,id\n{text}")
        with pytest.raises(ConfigError, match=r"p\.csv: not a table: .* \(before line \d\)"):
            load_prompts(str(path))


def test_every_prompt_comes_once_per_epoch_and_epochs_differ() -> None:
    prompts = [str(i) for i in range(20)]
    stream = PromptStream(prompts, seed=0)
    epochs = [[stream.prompt(20 * epoch + i) for i in range(20)] for epoch in range(5)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(prompts)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_prompt_is_a_function_of_the_image_number_alone() -> None:
    prompts = [str(i) for i in range(7)]
    forward = [PromptStream(prompts, seed=1).prompt(i) for i in range(50)]
    stream = PromptStream(prompts, seed=1)
    backward = [stream.prompt(i) for i in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [PromptStream(prompts, seed=2).prompt(i) for i in range(50)]


def test_one_prompt_is_enough() -> None:
    assert {PromptStream(["a cat"], seed=0).prompt(i) for i in range(5)} == {"a cat"}


def groups(name: str) -> list[str]:
    """Return the group of each prompt of a set."""
    return [entry.group for entry in load_entries(name)]


def test_groups_are_those_of_the_set_or_of_a_column(tmp_path: Path) -> None:
    assert set(groups("animals")) == {""}
    for entry in load_entries("shapes-heldout"):
        assert entry.group == entry.prompt.split()[0]
    assert set(groups("shapes-heldout")) == {"one", "two", "three", "four"}
    table = write(tmp_path / "set.csv", "prompt,group\na cat,pets\na cat,0\na thing,\n")
    assert groups(table) == ["pets", "0", ""]
    # Null is no group, so the next name counts; 0 is one, as in a table.
    rows = [{"text": "a fox", "group": "wild"}, {"text": "x", "group": 0}, {"text": "x"}]
    rows += [{"text": "y", "group": None, "tag": "z"}, {"text": "y", "tag": ["1girl"]}]
    lines = write(tmp_path / "set.jsonl", "\n".join(map(json.dumps, ["a dog", *rows])))
    assert groups(lines) == ["", "wild", "0", "", "z", ""]
    assert load_prompts(lines) == ["a dog", "a fox", "x", "x", "y", "y"]


def test_the_files_of_a_set_are_told_by_their_hash(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a cat\n")
    assert hashes(file) == {file: hashlib.sha256(b"a cat\n").hexdigest()}
    assert hashes("animals") == {}


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    text = {"p.txt": "ein Bär", "p.jsonl": '"ein Bär"', "p.json": '["ein Bär"]'}
    (tmp_path / name).write_text(text.get(name, "prompt\nein Bär\n"), encoding)
    assert load_prompts(str(tmp_path / name)) == ["ein Bär"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: nested too deeply"),
        ("p.json", '["a", ' + "[" * 100_000, r"p\.json: nested too deeply"),
        ("p.json", '[{"a":' * 200 + "1" + "}]" * 200, r"p\.json: nested too deeply"),
        ("p.jsonl", '"a"\n"\\ud800"', r"p\.jsonl:2: half of a surrogate pair"),
        ("p.json", '[{"prompt": "a \\udc00"}]', r"p\.json: half of a surrogate pair"),
        ("p.txt", "a\n" + "b" * 10_001, r"p\.txt:2: a prompt of 10001 characters"),
        ("p.csv", "prompt\na\n" + "b" * 10_001, r"p\.csv:3: a prompt of 10001 characters"),
        # Whichever bound is met first: that of the csv module, which score raises, or ours.
        ("p.csv", "p" * 200_000, r"p\.csv: (not a table: field larger|no column named)"),
        ("p.csv", "prompt\n" + "b" * 200_000, r"p\.csv(: not a table: field|:2: a prompt of)"),
    ],
)
def test_a_text_without_bounds_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        load_prompts(write(tmp_path / name, text))
    assert len(told.value.message) < 500


def test_fifty_megabytes_in_one_line_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"p\.txt:1: a prompt of 50000000 characters"):
        load_prompts(write(tmp_path / "p.txt", "x" * 50_000_000))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/x.txt", "is no path"),
        ("a\0b.txt", "is no path"),
        ("x" * 300 + ".txt", "File name too long"),
        ("\ud800.txt", "is no path"),
    ],
)
def test_what_can_be_no_path_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        load_prompts(name)
    assert len(told.value.message) < 200


def test_only_files_are_read_as_prompts(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(AssetError, match="is a folder"):
        load_prompts(str(tmp_path / "folder.txt"))
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(AssetError, match="is a pipe or a device"):
            load_prompts(str(tmp_path / name))


def tokenizers() -> dict[str, Callable[[str], torch.Tensor]]:
    """Return CLIP's tokenizer, of 77 tokens, as open_clip and as transformers has it."""
    theirs = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    return {
        "open_clip": lambda text: open_clip.tokenize([text])[0],
        "transformers": lambda text: torch.tensor(theirs(text, **options).input_ids),
    }


TOKENIZERS = tokenizers()
WORDS = ["a", "cat", "Bär", "雪", "🙂", "internationalisation", "<tag>", "&amp;", "1234", "...,,!?"]


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@settings(max_examples=25)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), st.sampled_from([" ", "\n\t  "]))
def test_what_a_tokenizer_is_given_has_the_tokens_of_the_whole_text(
    library: str, words: list[str], blank: str
) -> None:
    text = blank.join(words * (2 * MOST_CHARACTERS // len(blank.join(words) + blank) + 1))
    assert len(text) > MOST_CHARACTERS
    given_text = for_tokenizer(text)
    assert len(given_text) <= MOST_CHARACTERS
    tokenize = TOKENIZERS[library]
    assert torch.equal(tokenize(given_text), tokenize(text))


def test_a_text_of_blanks_and_one_long_word_have_the_tokens_of_the_whole() -> None:
    for text in ("a cat" + " " * 50_000 + "on a mat", "x" * 20_000, "ab" * 10_000 + " cat"):
        for tokenize in TOKENIZERS.values():
            assert torch.equal(tokenize(for_tokenizer(text)), tokenize(text))
    short = "  kept \n as it is "
    assert for_tokenizer(short) is short


def test_the_longest_token_is_far_shorter_than_the_bound_allows() -> None:
    # 75 tokens besides the two that mark beginning and end.
    longest = max(
        len(token.removesuffix("</w>")) for token in open_clip.tokenizer._tokenizer.encoder
    )
    assert 75 * longest < MOST_CHARACTERS


def test_one_of_the_prompts_that_are_cut_is_named() -> None:
    said = cut_note("clip", ["a" * 100 + " on a brown mat", "b"], 7)
    assert said.startswith("clip does not read 2 of 7 prompts to their end")
    assert "on a brown mat" in said
    assert len(said) < 200
    # A prompt of a table may have several lines, and none of them is a line of ours.
    assert "\n" not in cut_note("clip", ["a cat\nerror: all is lost"], 1)


@pytest.mark.parametrize("kind", [VlmReward, HpsV3Reward])
def test_rewards_that_read_any_length_say_what_is_kept_from_them(kind: type) -> None:
    # No weights: what is given to the tokenizer does not depend on them.
    member = Member("wordy", object.__new__(kind), 1.0, parse({"reward": {"clip": {}}}).loss)
    mixture = Mixture([member])
    # Blanks are none of the words that are lost.
    whole = ["a cat", "ab " * 3333, "a" + " " * 20_000 + "cat"]
    assert mixture.cut_notes(whole) == []
    assert [for_tokenizer(text).split() for text in whole] == [text.split() for text in whole]
    (said,) = mixture.cut_notes([*whole, "ab " * 3334 + "the end"])
    assert said.startswith("wordy does not read 1 of 4 prompts to their end")
    assert said.endswith("the end'")
