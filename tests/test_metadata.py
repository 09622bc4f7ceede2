import json
from pathlib import Path
from typing import Any

import pytest

import build_kernel
from build_kernel import (
    PLACEHOLDER,
    check_rules,
    dataset_rules,
    kernel_rules,
    read_metadata,
    slugify,
)
from kernel.manifest import Manifest, MemberSpec

ROOT = Path(__file__).parents[1]
DATASET: dict[str, Any] = json.loads((ROOT / "dataset-metadata.json").read_text("utf-8"))
KERNEL: dict[str, Any] = json.loads((ROOT / "kernel/kernel-metadata.json").read_text("utf-8"))
FILES = ["ensemble.json", "inference.py"]
COMPETITION = "severstal-steel-defect-detection"
MANIFEST = Manifest([MemberSpec("a", "a.safetensors", {}, [0.3], [0.1])])


def check_dataset(**changes: Any) -> None:
    check_rules(Path("dataset-metadata.json"), dataset_rules(DATASET | changes, FILES))


def check_kernel(**changes: Any) -> None:
    rules = kernel_rules(KERNEL | changes, DATASET["id"], COMPETITION)
    check_rules(Path("kernel-metadata.json"), rules)


def test_the_committed_files_keep_the_rules() -> None:
    check_dataset()
    check_kernel()
    assert DATASET["id"].startswith(PLACEHOLDER + "/")


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "a" * 6},
        {"title": "a" * 50},
        {"id": "me/" + "a" * 6},
        {"id": "me/" + "a" * 50},
        {"subtitle": "a" * 20},
        {"subtitle": "a" * 80},
        {"subtitle": None},
        {"resources": [{"path": "ensemble.json"}]},
        {"licenses": [{"name": "CC0-1.0"}]},
    ],
)
def test_a_dataset_at_the_edge_of_a_rule_passes(changes: dict[str, Any]) -> None:
    check_dataset(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "no-owner"}, r"id 'no-owner' is not owner/slug.*--owner"),
        ({"id": "a/b/c"}, "is not owner/slug"),
        ({"id": "me/Capital-Slug"}, "small letters"),
        ({"id": "me/short"}, r"slug 'short' has 5 characters, not 6 to 50"),
        ({"id": "me/" + "a" * 51}, "has 51 characters"),
        ({"title": "short"}, r"title 'short' has 5 characters, not 6 to 50; reword"),
        ({"title": "a" * 51}, "title .* has 51 characters"),
        ({"title": None}, "title None"),
        ({"subtitle": "a" * 19}, "subtitle .* has 19 characters, not 20 to 80"),
        ({"subtitle": "a" * 81}, "subtitle .* has 81 characters"),
        ({"licenses": []}, r"licenses \[\] is not exactly one licence"),
        ({"licenses": [{"name": "CC0-1.0"}] * 2}, "is not exactly one licence"),
        ({"licenses": None}, "is not exactly one licence"),
        ({"licenses": [{"name": "Freeware"}]}, "unknown licence 'Freeware'; choose of .*CC0-1.0"),
        ({"resources": [{"path": "absent.csv"}]}, r"\['absent.csv'\] are not in the dataset"),
        ({"resources": [{"path": "ensemble.json"}] * 2}, "name a file twice"),
    ],
)
def test_a_dataset_that_kaggle_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset-metadata\.json: Kaggle refuses it: .*{words}"):
        check_dataset(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": None}, "id None is not owner/slug"),
        ({"title": "abcd", "id": "me/abcd"}, "title 'abcd' has fewer than 5 characters"),
        ({"title": "a - b", "id": "me/a-b"}, "slug 'a-b' has fewer than 5 characters"),
        ({"title": "Stähle", "id": "me/stahle"}, "title 'Stähle' is not of letters"),
        ({"title": "Another title"}, "resolves to 'another-title', the id says.*agree"),
        ({"code_file": "main.py"}, "code_file 'main.py' is not 'inference.py'"),
        ({"language": "r"}, "language 'r'"),
        ({"kernel_type": "notebook"}, "kernel_type 'notebook'"),
        (
            {"enable_internet": True},
            'enable_internet True is not False; write "enable_internet": false',
        ),
        ({"enable_internet": None}, "enable_internet None"),
        ({"enable_internet": 0}, "enable_internet 0"),
        ({"enable_gpu": False}, "enable_gpu False"),
        ({"is_private": False}, "is_private False"),
        (
            {"machine_shape": "NvidiaTeslaP100"},
            "machine_shape 'NvidiaTeslaP100' is not 'NvidiaTeslaT4'",
        ),
        ({"dataset_sources": []}, r"dataset_sources \[\] is not \['your-kaggle-name/"),
        ({"competition_sources": ["titanic"]}, "competition_sources"),
        (
            {"docker_image_pinning_type": "newest"},
            "docker_image_pinning_type 'newest'.*original or latest",
        ),
    ],
)
def test_a_kernel_that_kaggle_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^kernel-metadata\.json: Kaggle refuses it: .*{words}"):
        check_kernel(**changes)


def test_a_key_left_out_of_the_kernel_is_refused() -> None:
    # the client's own default for enable_internet is true
    lacking = {key: value for key, value in KERNEL.items() if key != "enable_internet"}
    with pytest.raises(ValueError, match="enable_internet None"):
        check_rules(Path("k.json"), kernel_rules(lacking, DATASET["id"], COMPETITION))


def test_an_owner_fills_both_files() -> None:
    metadata = read_metadata("steelworker", MANIFEST)
    assert metadata.owner == "steelworker"
    assert metadata.dataset["id"] == "steelworker/severstal-steel-ensemble"
    assert metadata.kernel["id"] == "steelworker/severstal-steel-ensemble-submission"
    assert metadata.kernel["dataset_sources"] == [metadata.dataset["id"]]


def test_without_an_owner_the_dataset_file_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dataset-metadata.json"
    path.write_text(json.dumps(DATASET | {"id": "smith/steel-members"}))
    monkeypatch.setattr(build_kernel, "DATASET", path)
    metadata = read_metadata(None, MANIFEST)
    assert metadata.kernel["id"].startswith("smith/")
    assert metadata.kernel["dataset_sources"] == ["smith/steel-members"]


def test_an_owner_that_is_no_kaggle_name_is_refused() -> None:
    with pytest.raises(ValueError, match="id 'Two Words/"):
        read_metadata("Two Words", MANIFEST)


def test_metadata_that_is_no_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dataset-metadata.json"
    path.write_text("{")
    monkeypatch.setattr(build_kernel, "DATASET", path)
    with pytest.raises(ValueError, match=r"dataset-metadata\.json: no JSON"):
        read_metadata(None, MANIFEST)


@pytest.mark.parametrize(
    ("title", "slug"),
    [("Steel v2", "steel-v2"), ("  A  b ", "a-b"), ("-A - b", "a-b"), ("severstal", "severstal")],
)
def test_a_title_becomes_an_address(title: str, slug: str) -> None:
    assert slugify(title) == slug
