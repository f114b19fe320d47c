"""What is compared has names that are different folders, whatever files are called."""

from __future__ import annotations

from pathlib import Path

from alignprop_cli.evaluation.run import variants
from alignprop_cli.lora.files import Located


def names(*files: str) -> list[str]:
    return [variant.name for variant in variants([Located(Path(file)) for file in files], None)]


def test_files_are_called_by_their_names_and_numbered_where_those_are_alike() -> None:
    assert names("a/x.safetensors") == ["tuned"]
    assert names("a/x.safetensors", "b/y 2.safetensors") == ["x", "y-2"]
    assert names("a/x.safetensors", "b/x.safetensors") == ["1-x", "2-x"]
    # One folder to a file system that ignores the size of letters.
    assert names("a/x.safetensors", "b/X.safetensors") == ["1-x", "2-X"]
    assert names("a/Base.safetensors", "b/y.safetensors") == ["1-Base", "2-y"]
    # A metric in results.json has a key of that name beside the models.
    assert names("a/trained_on.safetensors", "b/y.safetensors") == ["1-trained_on", "2-y"]


def test_no_name_of_a_file_is_another_folder_or_too_long_for_one(tmp_path: Path) -> None:
    long = "\U00020000" * 60
    found = names("...safetensors", "y.safetensors", f"{long}a.safetensors", f"{long}b.safetensors")
    for name in found:
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        assert place.resolve().parent == tmp_path / "images"
    assert len(set(found)) == 4


def test_every_strength_has_a_name_of_its_own() -> None:
    strengths = [0.0, 0.1, 1.0, 1.0 + 1e-7, 1.5]
    found = variants([Located(Path("x.safetensors"))], strengths)
    assert [variant.name for variant in found] == [
        "strength 0",
        "strength 0.1",
        "strength 1",
        "strength 1.0000001",
        "strength 1.5",
    ]
    shares = variants([Located(Path("x.safetensors"))], None, [0.3, 0.3 + 1e-9])
    assert [variant.name for variant in shares] == ["base until 0.3", "base until 0.300000001"]
