"""Configurations: YAML files, texts of `--set`, files of prompts."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz import strange
from tests.fuzz.assets import QUICK, Assets
from tests.fuzz.domains.base import SMALL, argument

PRESETS = Path(__file__).parents[3] / "presets"


def configs(rng: Random, place: Path, assets: Assets) -> list[str]:
    """YAML files: presets with values changed, with bytes changed, and tricks of the language."""
    file = place / "c.yaml"
    source = rng.choice(("tiny", "tiny", "tiny_mix", "aesthetic", "count", "hps"))
    text = (PRESETS / f"{source}.yaml").read_text(encoding="utf-8")
    kind = rng.randrange(10)
    if kind < 5:
        data = strange.mutate(yaml.safe_load(text), rng, rng.choice((1, 1, 2, 4)))
        with contextlib.suppress(RecursionError):
            text = _yaml(data, rng)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind < 8:
        file.write_bytes(strange.damage(text.encode(), rng, rng.choice((1, 2, 5))))
    else:
        file.write_bytes(_trick(rng, place).encode("utf-8", "surrogatepass"))
    how = ["--show-preset", "--dry-run", "--dry-run", "--show-preset"][rng.randrange(4)]
    # The plan of a real model takes seconds.
    if not source.startswith("tiny") and rng.random() < 0.9:
        how = "--show-preset"
    return ["train", "--config=c.yaml", how, *rng.choice(([], [], ["--json"]))]


def _yaml(data: Any, rng: Random) -> str:
    if rng.random() < 0.3:
        return json.dumps(data, ensure_ascii=rng.random() < 0.5)
    return yaml.dump(data, sort_keys=False, allow_unicode=True)


def _trick(rng: Random, place: Path) -> str:
    levels = rng.choice((3, 9, 30))
    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{n}: &a{n} {{" + ", ".join(f"k{i}: *a{n - 1}" for i in range(9)) + "}\n"
        for n in range(1, levels)
    )
    if rng.random() < 0.3 and not (place / "pipe.yaml").exists():
        os.mkfifo(place / "pipe.yaml")
        (place / "loop.yaml").symlink_to("loop.yaml")
        (place / "self.yaml").write_text("extends: self.yaml\n")
        (place / "long.yaml").write_text("extends: " + "x" * 300 + ".yaml\n")
        for number in range(60):
            (place / f"n{number}.yaml").write_text(f"extends: n{number + 1}.yaml\n")
        (place / "n60.yaml").write_text("extends: tiny\n")
        name = rng.choice(
            (
                "pipe.yaml",
                "loop.yaml",
                "self.yaml",
                "./sub/../self.yaml",
                "long.yaml",
                "n0.yaml",
                "/dev/zero",
                "/dev/null",
                ".",
                "",
                "c.yaml",
                "./c.yaml",
                "../x/c.yaml",
                "nosuch.yaml",
                "~nosuchuser/c.yaml",
                rng.choice(strange.TEXTS),
            )
        )
        return "extends: " + json.dumps(name) + "\n"
    return rng.choice(
        (
            bomb,
            "&a {train: *a}\n",
            "train: &a [*a]\n",
            "[" * rng.choice((10, 60, 5000)),
            "{a: " * rng.choice((10, 60, 2000)),
            "- " * rng.choice((10, 60, 2000)) + "1\n",
            "extends: tiny\ntrain: {<<: {steps: 3}}\n",
            "extends: tiny\ntrain:\n  seed: "
            + rng.choice(("010", "1:30", "0x1f", "0o17", "1_000", "+3")),
            "extends: tiny\nlora: {alpha: "
            + rng.choice(("1e3", "1.e+3", ".5", ".inf", "no", "off", "~"))
            + "}",
            "extends: tiny\n? [a, b]\n: c\n",
            "extends: tiny\n? {a: b}\n: c\n",
            "extends: tiny\n!!str train: {steps: !!int x}\n",
            "extends: tiny\ntrain: !!"
            + rng.choice(
                (
                    "set {a}",
                    "omap [a: 1]",
                    "binary aGk=",
                    "timestamp x",
                    "bool x",
                    "python/object:os.system x",
                    "null x",
                    "float ''",
                    "int ''",
                )
            ),
            "%YAML 9.9\n---\nextends: tiny\n",
            "%TAG ! tag:x,2000:\n---\nextends: tiny\n",
            "---\nextends: tiny\n---\nextends: tiny\n",
            "extends: tiny\ntrain:\n\tsteps: 3\n",
            "extends: tiny\nextends: tiny\n",
            "extends: tiny\r\ntrain:\r\n  steps: 3\r\n",
            "extends: [tiny, tiny]\n",
            'extends: tiny\nreward: {clip: {model: tiny}, "\\0": {}}\n',
            'extends: tiny\nreward: {"x.py:f": {}, "a:b:c": {}, ":": {}}\n',
            "# only a comment\n",
            "",
            "\ufeffextends: tiny\n",
            'extends: tiny\nlora: {target_modules: "'
            + rng.choice(("(", "(a+)+$", "\\\\", ".*", ""))
            + '"}\n',
            "1: 2\nnull: 3\n? ''\n: 4\n1.5: 6\ntrue: 7\n",
            "extends: tiny\ntrain: {steps: " + "9" * rng.choice((20, 400, 5000)) + "}\n",
            'extends: tiny\nmodel: {id: "'
            + rng.choice(("..", "a/b/c", "a/b", "-x/y", "a" * 300, "\\ud800", "\\e[2J"))
            + '"}\n',
        )
    )


PLAUSIBLE = (
    "1", "2", "3", "5", "8", "16", "64", "0", "0.1", "0.5", "1.5", "1e-3", "true", "false", "null",
    "auto", "none", "full", "last_k", "gaussian_k", "target", "hinge", "float16", "bfloat16",
    "tiny", "clip", "shapes", "animals-eval", "[to_q]", "[to_k,to_v]", "'to_[qk]'", "[0.2,0.8]",
    "{}", "{clip: {model: tiny}}", "{brightness: {weight: -1}}", "{kind: hinge, target: 1.0}",
)  # fmt: skip
"""Values that some keys may have."""


def assignments(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Texts of `--set`."""
    import alignprop_cli.config.schema as schema

    sets = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        section = rng.choice(list(schema.Config.model_fields))
        fields = getattr(schema.Config.model_fields[section].annotation, "model_fields", {})
        inner = rng.choice(list(fields) or ["clip.model", "clip.weight", "brightness.loss", "x"])
        key = rng.choice(
            (f"{section}.{inner}", f"{section}.{inner}", section, f"{section}.{inner}.x")
        )
        if rng.random() < 0.1:
            key = rng.choice(strange.TEXTS)
        found = strange.value(rng)
        with contextlib.suppress(RecursionError):
            plain = rng.choice(PLAUSIBLE)
            # Many are taken as they are: else nothing behind the checks would be tried.
            if inner in fields and rng.random() < 0.5:
                default = fields[inner].get_default(call_default_factory=True)
                plain = json.dumps(default * 2 if type(default) is int else default)
            odd = (str(found), json.dumps(found), _trick(rng, place)[:500], "&a [*a]")
            text = plain if rng.random() < 0.6 else rng.choice(odd)
            if rng.random() < 0.2:
                text = strange.damage(text.encode("utf-8", "replace"), rng).decode(
                    "utf-8", "replace"
                )
            sets.append(f"--set={key}{rng.choice(('=', '=', '=', '', ':', '=='))}{text}")
    how = "--dry-run" if rng.random() < 0.1 else "--show-preset"
    return ["train", "--preset=tiny", how, *(argument(text) for text in sets)]


def prompts(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Prompt files of all four formats."""
    suffix = rng.choice((".txt", ".json", ".jsonl", ".csv"))
    texts = [rng.choice((*strange.TEXTS, "a red circle", "two blue squares")) for _ in range(5)]
    rows: Any = [
        rng.choice(
            (
                text,
                {rng.choice(("prompt", "text", "caption", "x")): text, "group": strange.value(rng)},
            )
        )
        for text in texts
    ]
    if rng.random() < 0.6:
        rows = strange.mutate(rows, rng, rng.choice((1, 2)))
    with contextlib.suppress(RecursionError):
        if suffix == ".json":
            data = json.dumps(rows, ensure_ascii=rng.random() < 0.5)
        elif suffix == ".jsonl":
            lines = rows if isinstance(rows, list) else [rows]
            data = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in lines)
        elif suffix == ".csv":
            table = io.StringIO()
            writer = csv.writer(table)
            writer.writerow(
                rng.choice((["prompt", "group"], ["text"], ["x"], ["prompt", "prompt"], []))
            )
            writer.writerows(
                [text.replace("\r", " "), 1][: rng.choice((1, 2, 2))] for text in texts
            )
            data = table.getvalue()
        else:
            data = "\n".join(texts)
        raw = data.encode(
            rng.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig", "latin-1")), "replace"
        )
        if rng.random() < 0.1:
            raw = data.encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            raw = strange.damage(raw, rng)
        (place / f"p{suffix}").write_bytes(raw)
    name = f"p{suffix}"
    if rng.random() < 0.05:
        os.mkfifo(place / "pipe.txt")
        name = rng.choice(("pipe.txt", ".", "/dev/zero", "~nosuchuser/p.txt", "p", "p.yaml"))
    if rng.random() < 0.04:
        return ["evaluate", "base", "--preset=tiny", f"--prompts={name}", "--output=e", *SMALL]
    if rng.random() < 0.03:
        return [
            "train",
            "--preset=tiny",
            "--steps=1",
            f"--set=train.prompts={name}",
            "--output=r",
            *QUICK,
        ]
    key = rng.choice(("train.prompts", "eval.prompts"))
    return ["train", "--preset=tiny", "--dry-run", f"--set={key}={name}"]
