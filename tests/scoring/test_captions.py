"""The prompt of an image comes from the first place that has one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.scoring import captions
from alignprop_cli.scoring.captions import PromptFinder, read_table
from alignprop_cli.scoring.embedded import Unclear, embedded_prompt, from_infotext
from alignprop_cli.scoring.files import Found, read_image
from tests.factories import picture


def prompt_of(path, root=None, **options):
    texts = read_image(path).texts
    return PromptFinder(**options).find(Found(path, root or path.parent), texts)[:2]


def test_prompts_come_from_the_first_source_that_has_one(tmp_path):
    path = picture(tmp_path / "sub" / "a.png", prompt="own")
    table = tmp_path / "prompts.csv"
    assert prompt_of(path) == ("own", "image")
    path.with_suffix(".caption").write_text("kohya's\n")
    assert prompt_of(path) == ("kohya's", "sidecar")
    path.with_suffix(".txt").write_text("beside\n")
    assert prompt_of(path) == ("beside", "sidecar")
    (tmp_path / "metadata.jsonl").write_text(
        '\n{"file_name": "sub/a.png", "text": "of the folder\\u2028", "other": 1}\n'
    )
    assert prompt_of(path) == ("beside", "sidecar")
    assert prompt_of(path, tmp_path) == ("of the folder\u2028", "metadata")
    (path.parent / "metadata.csv").write_text('file_name,caption\na.png,"nearer, and quoted"\n')
    assert prompt_of(path, tmp_path) == ("nearer, and quoted", "metadata")
    table.write_text("file_name,prompt\nsub/a.png,from the file\n")
    assert prompt_of(path, table=table) == ("from the file", "file")
    assert prompt_of(path, table=table, prompt="flag") == ("flag", "flag")


def test_a_table_does_not_answer_for_files_of_the_same_name_elsewhere(tmp_path):
    path = picture(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,another picture\n")
    assert prompt_of(path, tmp_path) == (None, "none")


A1111 = """two cats, (masterpiece:1.2),
<lora:fur:0.8> on a mat
Negative prompt: dog,
Steps of stone
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"""


def test_the_settings_of_a1111_are_cut_off_its_prompt():
    expected = ("two cats, (masterpiece:1.2), on a mat", "a1111")
    assert embedded_prompt({"parameters": A1111}) == expected
    assert embedded_prompt({"UserComment": A1111}) == expected
    assert embedded_prompt({"parameters": "a cat\nSteps: 20, Seed: 1"}) == ("a cat", "a1111")
    # Without settings it may be anything; with nothing before them there is no prompt.
    assert embedded_prompt({"UserComment": "holiday 2019"}) == (None, "none")
    assert embedded_prompt({"parameters": "Negative prompt: dog\nSteps: 20"}) == (None, "none")


def graph(*texts, combine=False):
    """Return a graph as ComfyUI saves it, whose sampler is asked for the given texts."""
    nodes = {
        "3": {"class_type": "KSampler", "inputs": {"positive": ["20", 0], "negative": ["7", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
        "20": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["30", 0]}},
        "30": {
            "class_type": "ConditioningCombine",
            "inputs": {"conditioning_1": ["40", 0], "conditioning_2": [str(39 + len(texts)), 0]},
        },
    }
    for number, text in enumerate(texts, start=40):
        nodes[str(number)] = {"class_type": "CLIPTextEncode", "inputs": {"text": text}}
    return nodes


def test_a_graph_of_comfyui_is_followed_from_its_sampler():
    assert embedded_prompt({"prompt": json.dumps(graph("a cat"))}) == ("a cat", "comfyui")
    # A text may come from a node of its own, and the two encoders of SDXL have one each.
    nodes = graph(["50", 0]) | {"50": {"class_type": "PrimitiveString", "inputs": {"value": "x"}}}
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("x", "comfyui")
    nodes["40"]["inputs"] = {"text_g": "a dog", "text_l": "a dog", "width": 1024}
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("a dog", "comfyui")
    guided = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0]}},
        "2": {"class_type": "BasicGuider", "inputs": {"conditioning": ["40", 0]}},
    }
    nodes = {**graph("flux"), **guided, "3": {"class_type": "Note", "inputs": {}}}
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("flux", "comfyui")


ENCODED = {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}
JOINED = {"class_type": "StringConcatenate", "inputs": {"string_a": "a", "string_b": "b"}}


@pytest.mark.parametrize(
    "nodes",
    [
        graph("a cat", "a dog"),
        graph("a cat") | {"20": {"class_type": "Unknown", "inputs": {"clip": ["40", 0]}}},
        graph(["50", 0]) | {"50": JOINED},
        graph("a cat") | {"40": ENCODED | {"inputs": {"clip_l": "a cat", "t5xxl": ["50", 0]}}},
        graph("a cat")
        | {"41": ENCODED | {"inputs": {"text": "a dog"}}}
        | {
            "20": {
                "class_type": "ConditioningConcat",
                "inputs": {"conditioning_to": ["40", 0], "conditioning_from": ["41", 0]},
            }
        },
        {"3": {"class_type": "KSampler"}},
        {"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0]}}},
        {"3": {"class_type": "KSampler", "inputs": {"positive": [[], 0]}}},
    ],
    ids=[
        "two texts",
        "an unknown node",
        "a joined text",
        "half a text",
        "two joined",
        "no inputs",
        "a circle",
        "a wrong link",
    ],
)
def test_a_graph_that_is_not_clear_gives_no_prompt(tmp_path, nodes):
    path = picture(tmp_path / "a.png", prompt=json.dumps(nodes))
    assert prompt_of(path) == (None, "none")


def test_a_text_that_is_nested_without_end_is_no_graph():
    text = '{"a":' + "[" * 100_000
    assert embedded_prompt({"prompt": text}) == (text, "image")


def test_a_table_counts_from_its_own_folder_first_and_a_link_by_its_name(tmp_path):
    inner = picture(tmp_path / "sub" / "a.png")
    (tmp_path / "p.csv").write_text("file_name,prompt\na.png,TOP\nsub/a.png,INNER\n")
    assert prompt_of(inner, inner.parent, table=tmp_path / "p.csv") == ("INNER", "file")
    (tmp_path / "sub" / "b.png").symlink_to(inner)
    (tmp_path / "sub" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "A"}\n{"file_name": "b.png", "text": "B"}\n'
    )
    assert prompt_of(inner) == ("A", "metadata")
    assert prompt_of(inner.with_name("b.png")) == ("B", "metadata")


def test_metadata_about_something_else_and_empty_prompts_are_passed_over(tmp_path):
    path = picture(tmp_path / "a.png", prompt="own")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,3\n")
    assert prompt_of(path) == ("own", "image")
    (tmp_path / "metadata.csv").write_text("file_name,text,caption\na.png,,c\n")
    assert prompt_of(path) == ("c", "metadata")
    (tmp_path / "p.csv").write_text("file_name,label\na.png,3\n")
    with pytest.raises(ConfigError, match="expected file_name"):
        prompt_of(path, table=tmp_path / "p.csv")


def test_tables_hold_any_line_separator_and_long_prompts(tmp_path):
    path, long = picture(tmp_path / "a.png"), "x" * 200_000
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,a\u2028b\x85c{long}\n", "utf-8")
    assert prompt_of(path) == (f"a\u2028b\x85c{long}", "metadata")


def test_half_a_pair_of_surrogates_is_no_prompt(tmp_path):
    path, table = picture(tmp_path / "a.png"), tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "text": "a \\ud83d"}\n')
    caption = PromptFinder().find(Found(path, tmp_path), {})
    assert caption[:2] == (None, "none")
    assert "metadata.jsonl:1: a prompt with half of a surrogate pair" in caption.why
    with pytest.raises(ConfigError, match=r"metadata\.jsonl:1: .* half of a surrogate pair"):
        prompt_of(path, table=table)
    path = picture(tmp_path / "graph" / "b.png", prompt=json.dumps(graph("a \ud83d")))
    caption = PromptFinder().find(Found(path, path.parent), read_image(path).texts)
    assert caption[:2] == (None, "none")
    assert "surrogate" in caption.why


def test_what_only_begins_like_a_graph_is_a_prompt():
    assert embedded_prompt({"prompt": "{a|b} cat"}) == ("{a|b} cat", "image")
    assert embedded_prompt({"prompt": '{"a": 1}'}) == ('{"a": 1}', "image")


def test_the_folders_of_geneval_say_the_prompt_of_their_samples(tmp_path):
    sample = picture(tmp_path / "00007" / "samples" / "00000.png")
    grid = picture(tmp_path / "00007" / "grid.png")
    line = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    (tmp_path / "00007" / "metadata.jsonl").write_text(json.dumps(line))
    assert prompt_of(sample, tmp_path) == ("two cats", "geneval")
    assert prompt_of(grid, tmp_path) == (None, "none")


def test_the_folders_of_hpsv2_say_the_prompt_by_its_number(tmp_path, monkeypatch):
    asked = []

    def load_prompts(name):
        asked.append(name)
        return ["first", "second"]

    # The real ones come from the hub.
    monkeypatch.setattr(captions, "load_prompts", load_prompts)
    finder = PromptFinder()
    paths = [picture(tmp_path / "anime" / f"0000{n}.jpg") for n in (0, 1, 2)]
    found = [finder.find(Found(path, tmp_path), {})[:2] for path in paths]
    assert found == [("first", "hpd"), ("second", "hpd"), (None, "none")]
    assert asked == ["hpd:anime"]
    cover = finder.find(Found(tmp_path / "anime" / "cover.jpg", tmp_path), {})
    assert cover == (None, "none", None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"file_name": "a.png"', "a.jsonl:1: not JSON"),
        ("a.jsonl", '\n["a.png", "x"]', "a.jsonl:2: expected an object"),
        ("a.jsonl", '{"prompt": "x"}', "a.jsonl:1: expected file_name"),
        ("a.csv", "file,prompt\na.png,x\n", "a.csv:2: expected file_name"),
        ("a.txt", "x", "expected a .jsonl or .csv"),
    ],
)
def test_a_table_that_cannot_be_understood_names_the_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_table(tmp_path / name)


HANDED = Path(os.environ.get("ALIGNPROP_CASES", Path(__file__).parents[3] / "shared" / "cases"))


@pytest.mark.parametrize(
    ("name", "prompt", "source", "why"),
    [
        ("a1111_txt/1.png", "a red circle", "sidecar", None),
        ("a1111_txt/2.png", "a red circle", "sidecar", None),
        ("a1111_txt/3.png", "a red circle", "a1111", None),
        ("comfy_textfile.png", None, "none", "'LoadTextFile' may change the prompt"),
        ("comfy_zeroout.png", None, "none", "'ConditioningZeroOut' may change the prompt"),
    ],
)
def test_the_handed_pictures_give_the_prompt_they_were_drawn_with(name, prompt, source, why):
    path = HANDED / "pictures" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; set ALIGNPROP_CASES to the folder of cases")
    found = PromptFinder().find(Found(path, path.parent), read_image(path).texts)
    assert found[:2] == (prompt, source)
    assert found.why is None if why is None else why in found.why


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (A1111, "two cats, (masterpiece:1.2), on a mat"),
        (A1111.replace("\n", "\r\n"), "two cats, (masterpiece:1.2), on a mat"),
        # A caption by hand may have several lines, and one that begins like the settings.
        ("a stair\nSteps: 12, old and mossy", "a stair\nSteps: 12, old and mossy"),
        ("Steps: 20 of marble", "Steps: 20 of marble"),
        # A line of the prompt looks like settings; the last one is the settings.
        ("stairs,\nSteps: 12\nSteps: 20, Sampler: Euler a, Seed: 1", "stairs, Steps: 12"),
        # What the negative prompt says is not asked for, even where no settings follow.
        ("a red circle\nNegative prompt: blurry", "a red circle"),
    ],
)
def test_a_text_beside_an_image_is_read_as_the_one_inside(tmp_path, text, prompt):
    path = picture(tmp_path / "a.png", parameters="another\nSteps: 20, Seed: 1")
    path.with_suffix(".txt").write_bytes(text.encode())
    assert prompt_of(path) == (prompt, "sidecar")


def test_a_line_of_the_prompt_may_begin_like_the_settings():
    text = "Steps: 3\nof wood\nNegative prompt: x\nSteps: 5\nSteps: 20, Sampler: Euler, Seed: 1"
    assert embedded_prompt({"parameters": text}) == ("Steps: 3 of wood", "a1111")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_a_text_with_a_byte_order_mark_is_read_in_its_encoding(tmp_path, encoding):
    path = picture(tmp_path / "a.png")
    path.with_suffix(".txt").write_text("ein Bär\n", encoding)
    assert prompt_of(path) == ("ein Bär", "sidecar")
    (tmp_path / "t.csv").write_text("file_name,prompt\na.png,ein Igel\n", encoding)
    assert prompt_of(path, table=tmp_path / "t.csv") == ("ein Igel", "file")


def reason_of(path, **options):
    found = PromptFinder(**options).find(Found(path, path.parent), read_image(path).texts)
    assert found[:2] == (None, "none")
    return found.why


def test_what_is_near_and_cannot_be_read_gives_no_prompt_and_the_reason(tmp_path):
    path = picture(tmp_path / "a.png", prompt="own")
    sidecar = path.with_suffix(".txt")
    sidecar.write_bytes("ein Bär".encode("latin-1"))
    assert "a.txt is not UTF-8: byte 5 is 0xe4" in reason_of(path)
    sidecar.write_bytes(b"x" * (2**20 + 1))
    assert "a.txt has 1 MiB" in reason_of(path)
    sidecar.write_text("Negative prompt: dog\nSteps: 20, Seed: 1")
    assert reason_of(path) == "a.txt has settings and no prompt"
    sidecar.unlink()
    # A pipe may never end; it is none of the files that are looked for.
    os.mkfifo(sidecar)
    assert prompt_of(path) == ("own", "image")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,Bär\n".encode("latin-1"))
    assert "metadata.csv is not UTF-8" in reason_of(path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    assert "metadata.jsonl:1: nested too deeply" in reason_of(path)


def test_a_table_that_was_given_must_be_readable(tmp_path):
    path = picture(tmp_path / "a.png", prompt="own")
    (tmp_path / "t.csv").write_bytes("file_name,text\na.png,Bär\n".encode("latin-1"))
    with pytest.raises(AssetError, match="is not UTF-8"):
        prompt_of(path, table=tmp_path / "t.csv")
    os.mkfifo(tmp_path / "p.csv")
    with pytest.raises(AssetError, match="a pipe or a device"):
        prompt_of(path, table=tmp_path / "p.csv")
    (tmp_path / "l.csv").write_text(f"file_name,text\na.png,{'x' * (2**20 + 1)}\n")
    with pytest.raises(ConfigError, match=r"l\.csv:2: a prompt of 1048577 characters"):
        prompt_of(path, table=tmp_path / "l.csv")


def test_of_several_prompts_for_one_image_none_is_taken(tmp_path):
    first, path = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", prompt="own")
    # As in sets with several captions of each image.
    text = "file_name,text\na.png,one\nb.png,cat\n./b.png,dog\nb.png,cat\na.png,one\n"
    (tmp_path / "metadata.csv").write_text(text)
    assert reason_of(path) == "metadata.csv has several prompts for it"
    assert prompt_of(first) == ("one", "metadata")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"t\.csv:4: b\.png has another prompt before"):
        prompt_of(first, table=tmp_path / "t.csv")


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    path = picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "loss": NaN}\n')
    assert prompt_of(path) == ("x", "metadata")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a __animal__ on a mat", "a wildcard, '__animal__'"),
        ("__colors/warm__ hat", "a wildcard"),
        ("a {red|blue} cat", "alternatives, '{red|blue}'"),
        ("a {2::red|3::blue} cat", "alternatives"),
        ("a cat, (embedding:style.pt:1.2)", "an embedding"),
        ("C:/prompts/batch7.txt", "the name of a file"),
        ("styles.csv", "the name of a file"),
    ],
)
def test_a_text_that_stands_for_another_is_no_prompt(tmp_path, text, what):
    settings = "\nSteps: 20, Sampler: Euler a, Seed: 1"
    for prompt, found in (
        (None, {"parameters": text + settings}),
        (json.dumps(graph(text)), {}),
        (json.dumps(graph(["50", 0]) | {"50": string_node(text)}), {}),
    ):
        texts = found | ({} if prompt is None else {"prompt": prompt})
        with pytest.raises(Unclear, match="its prompt has"):
            embedded_prompt(texts)
    path = picture(tmp_path / "a.png")
    path.with_suffix(".txt").write_text(text)
    assert what in reason_of(path)
    # Names with an underscore, weights and braces alone are words.
    plain = "snake_case _art_ {masterpiece} (a|b:1.2) a__b"
    assert from_infotext(plain) == plain


def string_node(text):
    return {"class_type": "PrimitiveString", "inputs": {"value": text}}


def test_nodes_that_may_change_the_prompt_are_named(tmp_path):
    unknown = {
        # A style, a file, another random text: each has one input, and it is not the prompt.
        "StyleLoader": {"style": "cinematic"},
        "LoadTextFile": {"file_path": "a.txt"},
        "ImpactWildcardProcessor": {"wildcard_text": "a cat"},
        "easy stylesSelector": {"styles": "fooocus_styles"},
    }
    for kind, inputs in unknown.items():
        nodes = graph(["50", 0]) | {"50": {"class_type": kind, "inputs": inputs}}
        with pytest.raises(Unclear, match=f"'{kind}' may change the prompt"):
            embedded_prompt({"prompt": json.dumps(nodes)})
    for kind in ("ConditioningZeroOut", "CLIPTextEncodeWithWildcards", "StyleModelApply"):
        nodes = graph("a cat") | {"20": {"class_type": kind, "inputs": {"conditioning": ["40", 0]}}}
        with pytest.raises(Unclear, match=f"'{kind}' may change the prompt"):
            embedded_prompt({"prompt": json.dumps(nodes)})
    styled = {"class_type": "SDXLPromptStyler", "inputs": {"text_positive": "x", "style": "y"}}
    with pytest.raises(Unclear, match="'SDXLPromptStyler'"):
        embedded_prompt({"prompt": json.dumps(graph(["50", 0]) | {"50": styled})})
    with pytest.raises(Unclear, match="not there"):
        embedded_prompt({"prompt": json.dumps(graph("a cat") | {"20": {**PASSING_ON, **GONE}})})


PASSING_ON = {"class_type": "ControlNetApply"}
GONE = {"inputs": {"conditioning": ["99", 0]}}


def test_of_a_node_with_two_outputs_the_linked_one_is_followed():
    control = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["30", 0], "negative": ["7", 0]},
    }
    nodes = graph("a cat") | {"20": control}
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("a cat", "comfyui")
    nodes["3"]["inputs"]["positive"] = ["20", 1]
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("ugly", "comfyui")


def test_a_graph_may_hold_what_is_no_json():
    nodes = graph("a cat")
    nodes["7"]["is_changed"] = [float("nan")]
    assert embedded_prompt({"prompt": json.dumps(nodes)}) == ("a cat", "comfyui")
