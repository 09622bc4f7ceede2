import json
from pathlib import Path
from typing import Any

import pytest

from kernel.manifest import Manifest, MemberSpec
from packing import metadata
from packing.metadata import (
    PLACEHOLDER,
    check_dataset,
    check_kernel,
    read_fit_metadata,
    read_metadata,
    slugify,
)
from packing.paths import DATASET_METADATA, KERNEL_METADATA

DATASET: dict[str, Any] = json.loads(DATASET_METADATA.read_text("utf-8"))
KERNEL: dict[str, Any] = json.loads(KERNEL_METADATA.read_text("utf-8"))
FILES = ["ensemble.json", "inference.py"]
COMPETITION = "severstal-steel-defect-detection"
MANIFEST = Manifest([MemberSpec("a", "a.safetensors", {}, [0.3], [0.1])])


def test_the_committed_files_keep_the_rules() -> None:
    check_dataset(DATASET, FILES)
    check_kernel(KERNEL, DATASET["id"], COMPETITION)
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
        {"licenses": [{"name": "EU ODP Legal Notice"}]},
    ],
)
def test_a_dataset_at_the_edge_of_a_rule_passes(changes: dict[str, Any]) -> None:
    check_dataset(DATASET | changes, FILES)


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
        ({"subtitle": 7}, "subtitle 7 has 0 characters"),
        ({"licenses": []}, r"licenses \[\] is not exactly one licence"),
        ({"licenses": [{"name": "CC0-1.0"}] * 2}, "is not exactly one licence"),
        ({"licenses": None}, "is not exactly one licence"),
        ({"licenses": [{"title": "CC0-1.0"}]}, "is not exactly one licence"),
        ({"resources": [{"path": "absent.csv"}]}, r"\['absent.csv'\] are not in the dataset"),
        ({"resources": [{"path": "ensemble.json"}] * 2}, "name a file twice"),
    ],
)
def test_a_dataset_that_kaggle_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_dataset(DATASET | changes, FILES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": None}, "id None is not owner/slug"),
        ({"title": "abcd", "id": "me/abcd"}, "title 'abcd' has 4 characters, not 5 to 50"),
        ({"title": "a - b", "id": "me/a-b"}, "slug 'a-b' has 3 characters, not 5 to 50"),
        ({"title": "a" * 51, "id": "me/" + "a" * 51}, "title .* has 51 characters, not 5 to 50"),
        ({"title": "Stähle", "id": "me/stahle"}, "title 'Stähle' is not of letters"),
        ({"title": "Another title"}, "resolves to 'another-title', the id says.*agree"),
        ({"code_file": "main.py"}, "code_file 'main.py' is not 'inference.py'"),
        ({"language": "r"}, "language 'r'"),
        ({"kernel_type": "notebook"}, "kernel_type 'notebook'"),
        (
            {"enable_internet": True},
            'enable_internet True is not False; write "enable_internet": false',
        ),
        ({"enable_internet": None}, "enable_internet None"),  # the client's own default is true
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
    with pytest.raises(ValueError, match=words):
        check_kernel(KERNEL | changes, DATASET["id"], COMPETITION)


def test_a_kernel_may_have_other_sources_beside_the_bundle_and_the_competition() -> None:
    sources = {"dataset_sources": ["me/images", DATASET["id"]]}
    check_kernel(
        KERNEL | sources | {"competition_sources": [COMPETITION, "titanic"]},
        DATASET["id"],
        COMPETITION,
    )
    with pytest.raises(ValueError, match="dataset_sources"):
        check_kernel(KERNEL | {"dataset_sources": ["me/images"]}, DATASET["id"], COMPETITION)


# --- both files -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Copies of both files, which a test may change."""
    paths = {"dataset": tmp_path / DATASET_METADATA.name, "kernel": tmp_path / KERNEL_METADATA.name}
    paths["dataset"].write_text(json.dumps(DATASET), encoding="utf-8")
    paths["kernel"].write_text(json.dumps(KERNEL), encoding="utf-8")
    monkeypatch.setattr(metadata, "DATASET_METADATA", paths["dataset"])
    monkeypatch.setattr(metadata, "KERNEL_METADATA", paths["kernel"])
    return paths


def test_an_owner_fills_both_files() -> None:
    found = read_metadata("steelworker", MANIFEST)
    assert found.owner == "steelworker"
    assert found.dataset["id"] == "steelworker/severstal-steel-ensemble"
    assert found.kernel["id"] == "steelworker/severstal-steel-ensemble-submission"
    assert found.kernel["dataset_sources"] == [found.dataset["id"]]


def test_without_an_owner_the_dataset_file_gives_it(files: dict[str, Path]) -> None:
    files["dataset"].write_text(json.dumps(DATASET | {"id": "smith/steel-members"}))
    found = read_metadata(None, MANIFEST)
    assert found.kernel["id"].startswith("smith/")
    assert found.kernel["dataset_sources"] == ["smith/steel-members"]


@pytest.mark.parametrize(
    ("sources", "left_out"),
    [
        (["me/images", "smith/steel-members"], "['me/images'] are left out"),
        (["smith/steel-members"], ""),
        (["your-kaggle-name/severstal-steel-ensemble"], ""),
        ("smith/steel-members", ""),
    ],
)
def test_sources_that_the_kernel_will_not_have_are_named(
    sources: object, left_out: str, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    files["dataset"].write_text(json.dumps(DATASET | {"id": "smith/steel-members"}))
    files["kernel"].write_text(json.dumps(KERNEL | {"dataset_sources": sources}))
    found = read_metadata("jones", MANIFEST)
    assert found.kernel["dataset_sources"] == ["jones/steel-members"]
    assert left_out in caplog.text and bool(caplog.text) == bool(left_out)


def test_an_owner_that_is_no_kaggle_name_is_refused() -> None:
    with pytest.raises(ValueError, match="id 'Two Words/"):
        read_metadata("Two Words", MANIFEST)


def test_a_notebook_is_a_kernel_of_another_type() -> None:
    kernel = read_metadata("smith", MANIFEST, notebook=True).kernel
    assert (kernel["code_file"], kernel["kernel_type"]) == ("inference.ipynb", "notebook")


@pytest.mark.parametrize("which", ["dataset", "kernel"])
def test_a_file_that_kaggle_refuses_is_named(which: str, files: dict[str, Path]) -> None:
    entries = json.loads(files[which].read_text("utf-8"))
    files[which].write_text(json.dumps(entries | {"title": "No"}))
    with pytest.raises(ValueError, match=rf"{which}-metadata\.json: Kaggle refuses it: title 'No'"):
        read_metadata(None, MANIFEST)


@pytest.mark.parametrize("changes", [{"resources": ["a.csv"]}, {"licenses": ["CC0-1.0"]}])
def test_words_where_objects_belong_are_named(
    changes: dict[str, Any], files: dict[str, Path]
) -> None:
    files["dataset"].write_text(json.dumps(DATASET | changes))
    with pytest.raises(ValueError, match=r"dataset-metadata\.json: not Kaggle's metadata: .*str"):
        read_metadata(None, MANIFEST)


@pytest.mark.parametrize("sources", [None, 5, COMPETITION])
def test_competitions_that_are_no_list_are_named_with_what_to_write(
    sources: object, files: dict[str, Path]
) -> None:
    files["kernel"].write_text(json.dumps(KERNEL | {"competition_sources": sources}))
    words = rf'kernel-metadata\.json: .* competition_sources .* write .*\["{COMPETITION}"\]'
    with pytest.raises(ValueError, match=words):
        read_metadata(None, MANIFEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_gpu": False, "machine_shape": "NvidiaTeslaP100"},
        {"is_private": False},
        {"kernel_type": "notebook", "language": "r"},
        {"competition_sources": ["tgs-salt-identification-challenge"]},
    ],
)
def test_the_fit_kernel_has_its_settings_whatever_the_submissions_are(
    changes: dict[str, Any], files: dict[str, Path]
) -> None:
    found = read_fit_metadata("smith", resume=False)
    files["kernel"].write_text(json.dumps(KERNEL | changes))
    assert read_fit_metadata("smith", resume=False) == found
    assert KERNEL | {key: found[key] for key in changes} == KERNEL


@pytest.mark.parametrize("which", ["dataset", "kernel"])
def test_metadata_that_is_no_json_is_named(which: str, files: dict[str, Path]) -> None:
    files[which].write_text("{")
    with pytest.raises(ValueError, match=rf"{which}-metadata\.json: no JSON"):
        read_metadata(None, MANIFEST)


@pytest.mark.parametrize(
    ("title", "slug"),
    [("Steel v2", "steel-v2"), ("  A  b ", "a-b"), ("-A - b", "a-b"), ("severstal", "severstal")],
)
def test_a_title_becomes_an_address(title: str, slug: str) -> None:
    assert slugify(title) == slug
