"""The Hub's data sets: their files, configurations, splits and terms."""

from pathlib import Path

import pytest

from data import catalogue
from data.patience import DownloadError
from data.records import DatasetError
from tests.data.standin_data import get, parquet, reds
from tests.data.standin_hub import Fault, StandInHub


def test_a_data_set_on_the_hub_is_downloaded_with_its_splits_and_classes(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    found = get("hub:a/b", tmp_path / "d")
    assert found.counts == {"train": 8, "test": 2}
    assert found.class_names == ["cat", "dog"]
    assert found.origin == "a/b@" + "c" * 40
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))
    assert reds("hub:a/b", tmp_path / "d", start=6) == [6, 7]
    assert reds("hub:a/b", tmp_path / "d", "test") == [8, 9]
    assert catalogue.verify(tmp_path / "d") is None


def test_a_configuration_is_chosen_by_name(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/configs:small", tmp_path / "d")
    assert reds("hub:a/configs:small", tmp_path / "d") == [4, 5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:a/configs", r"\(big, small\), none was named. Write hub:a/configs:big"),
        ("hub:a/configs:tiny", r"\(big, small\), 'tiny' is none of them"),
        ("hub:a/nobody", "There must be a data set a/nobody on the Hub.*HF_TOKEN"),
        ("hub:a/b@v9", "a/b must have the revision v9"),
        ("hub:a/text", "must have Parquet files.*try hub:a/text@refs/convert/parquet"),
    ],
)
def test_a_mistake_is_said_once_and_not_tried_again(
    main_branch: StandInHub, tmp_path: Path, spec: str, message: str
) -> None:
    main_branch.add("a/text", {"README.md": b"# nothing here\n"})
    with pytest.raises(DatasetError, match=message):
        get(spec, tmp_path)
    asked = [path for _, path, _, _ in main_branch.requests if "/revision/v9" in path]
    assert len(asked) <= 1


def test_the_layout_of_the_hubs_conversion_is_read(hub: StandInHub, tmp_path: Path) -> None:
    hub.add(
        "a/b",
        {
            "small/train/0000.parquet": parquet(range(3)),
            "small/train/0001.parquet": parquet(range(3, 5)),
            "small/validation/0000.parquet": parquet(range(5, 7)),
            "big/train/0000.parquet": parquet(range(9)),
            "cut/partial-train/0000.parquet": parquet(range(9)),
        },
        revisions=("main", "refs/convert/parquet"),
    )
    branch = "hub:a/b@refs/convert/parquet"
    found = get(f"{branch}:small", tmp_path / "d")
    assert found.counts == {"train": 5, "test": 2}
    assert reds(f"{branch}:small", tmp_path / "d") == list(range(5))
    with pytest.raises(DatasetError, match=r"\(big, cut, small\), none was named"):
        get(branch, tmp_path / "e")
    with pytest.raises(DatasetError, match="converted only a part of cut"):
        get(f"{branch}:cut", tmp_path / "f")


def test_the_official_validation_images_are_the_test_images(
    hub: StandInHub, tmp_path: Path
) -> None:
    hub.add(
        "a/b",
        {
            f"data/{split}-00000-of-00001.parquet": parquet(range(first, first + 2))
            for split, first in (("train", 0), ("validation", 2), ("test", 4))
        },
    )
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d", "test") == [2, 3]


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_terms_that_are_not_accepted_are_said_with_page_and_variable(
    hub: StandInHub,
    tmp_path: Path,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(
        "ILSVRC/imagenet-1k",
        {"data/train-00000-of-00001.parquet": parquet(range(2))},
        gated_for="hf_mine",
    )
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = f"{hub.url}/datasets/ILSVRC/imagenet-1k"
    lacks = "has not, or the token" if token else "there is no token"
    with pytest.raises(DatasetError, match=f"{lacks}.*Open {page}.*HF_TOKEN"):
        get("imagenet-1k", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert get("imagenet-1k", tmp_path).counts == {"train": 2}


def test_terms_of_any_other_data_set_are_said_the_same_way(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    main_branch.repositories["a/b"].gated_for = "hf_mine"
    del main_branch.repositories["a/b"].files["README.md"]
    with pytest.raises(DatasetError, match=r"a/b is given only to those.*there is no token"):
        get("hub:a/b", tmp_path)


def test_a_hub_that_fails_for_a_while_is_waited_for(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    main_branch.api_faults += [Fault("status", 429, {"Retry-After": "0"}), Fault("status", 503)]
    main_branch.faults += [Fault("status", 500), Fault("cut", 9), Fault("flip")]
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))


def test_a_card_that_cannot_be_fetched_is_not_taken_for_none(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    """Without its card the data set would have test images too."""
    main_branch.add(
        "a/card",
        {
            **main_branch.repositories["a/b"].files,
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n"
            b"  - split: train\n    path: data/train-*.parquet\n---\n",
        },
    )
    main_branch.card_faults.append(Fault("cut"))
    assert get("hub:a/card", tmp_path).counts == {"train": 8}


def test_a_hub_that_is_down_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="list of files of a/b must be downloaded, 3 attempts"):
        get("hub:a/b", tmp_path)
