import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from data.specs import public_source
from models.errors import ModelError
from tests.training.standin_uploads import TOKEN, UploadHub, upload_hub
from training.errors import PublishError
from training.finished_models import FinishedRun, find_run
from training.publishing import Publication, assemble, publish
from training.settings import ConfigError

# huggingface_hub 2.4 uploads single large files in a way that its HTTP library calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "someone/rotation.vit_2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The stand-in, which this process takes for the Hub."""
    with upload_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it has a protocol of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def run(finished_run: Path) -> FinishedRun:
    return find_run(str(finished_run), Path("nowhere"))


@pytest.fixture
def publication(run: FinishedRun) -> Publication:
    return assemble(run, REPOSITORY, stage="finetune-2")


def test_model_card_and_results_arrive_in_one_commit(
    hub: UploadHub, publication: Publication, run: FinishedRun
) -> None:
    address = publish(publication, private=True)
    assert address == f"{hub.url}/{REPOSITORY}/commit/{1:040x}"
    assert hub.commits == ["Publish the model of finetune-2"]
    assert hub.private == {REPOSITORY}
    files = hub.repositories[REPOSITORY]
    model = run.stage_directory("finetune_2") / "model"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert files[name] == (model / name).read_bytes()
    assert files["README.md"].decode() == publication.card
    rows = json.loads(files["results.json"])["stages"]
    assert rows["finetune_2"]["top1"] == run.stages["finetune_2"]["top1"]
    assert {name: len(content) for name, content in files.items()} == {
        ".gitattributes": len(files[".gitattributes"]),
        **publication.sizes(),
    }


def test_nothing_published_says_where_things_lay(
    publication: Publication, run: FinishedRun
) -> None:
    source = run.results["data"]["pretrain"]
    assert source.startswith("folder:/")
    for name in ("README.md", "results.json", "config.yaml"):
        content = publication.files[name]
        assert isinstance(content, bytes)
        assert str(Path(source.removeprefix("folder:")).parent).encode() not in content
        assert str(run.directory.parents[1]).encode() not in content
    settings = yaml.safe_load(publication.files["config.yaml"])  # type: ignore[arg-type]
    assert settings["data"]["source"] == public_source(source)
    assert "tracking" not in settings


def test_no_address_is_published_with_its_password(run: FinishedRun) -> None:
    spec = "parquet:https://me:secret@host/a.parquet?token=1"
    results = copy.deepcopy(dict(run.results))
    results["data"]["pretrain"] = results["stages"]["prepare_data"]["source"] = spec
    results["stages"]["download"] = {"key": "k", "sources": {spec: spec.partition(":")[2]}}
    found = assemble(replace(run, results=results), "owner/name")
    for name, content in found.files.items():
        if isinstance(content, bytes):
            assert b"secret" not in content, name
            assert b"token=1" not in content, name


@pytest.mark.parametrize(
    ("spec", "public"),
    [
        ("drawn10", "drawn10"),
        ("hub:frgfm/imagenette@refs/convert/parquet:320px",) * 2,
        ("folder:/home/me/holidays", "folder:holidays"),
        ("parquet:/home/me/x-*.parquet", "parquet:x-*.parquet"),
        ("parquet:https://me:secret@host/a.parquet?token=1", "parquet:https://host/a.parquet"),
    ],
)
def test_sources_are_named_without_paths_users_and_tokens(spec: str, public: str) -> None:
    assert public_source(spec) == public


def test_the_card_has_numbers_data_limits_licence_and_citation(
    publication: Publication, run: FinishedRun
) -> None:
    card = publication.card
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["pipeline_tag"] == "image-classification"
    row = run.stages["finetune_2"]
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(row["top1"], abs=1e-4)
    assert "datasets" not in values, "no such data set on the Hub"
    assert f"| fine-tune 2: head + last two blocks **(this model)** | {row['top1']:.3f} |" in body
    right = run.stages["linear_probe"]["random_backbone_correct"]
    assert f"| {right} of 21 |" in body
    headings = [line for line in body.splitlines() if line.startswith("## ")]
    assert headings == [
        f"## {name}" for name in ("Numbers", "Use", "Data", "Limits", "How to cite")
    ]
    assert "Classes: car, house, tree." in body
    assert "the short side is resized to 20 px and the central 16 px" in body
    assert "unknown to rotation-vit; ask where the images come from" in body
    assert "pretrained on: `folder:" in body
    assert "trained and tested on: `folder:" in body
    assert "30 labelled images" in body
    assert "author = {someone}" in body


def test_each_stage_has_a_card_of_its_own(run: FinishedRun) -> None:
    best = assemble(run, REPOSITORY)
    assert f"This model is that of {best.stage.replace('_', '-')}, the best on val." in best.card
    own = assemble(run, REPOSITORY, stage="pretrain", data_licence="Mine: CC0.").card
    assert "which way up a photo is" in own
    assert "| rotation accuracy **(this model)** |" in own
    assert "trained and tested on" not in own
    assert "Classes:" not in own
    assert "- Mine: CC0." in own
    scratch = assemble(run, REPOSITORY, stage="from-scratch").card
    assert "pretrained on" not in scratch


@pytest.mark.parametrize("source", ["drawn10", "imagenette", "imagenet-1k", "cifar10"])
def test_known_data_sets_have_their_licence_in_the_card(run: FinishedRun, source: str) -> None:
    run.results["data"].update(pretrain=source, transfer=source)
    card = assemble(run, REPOSITORY).card
    assert f"- `{source}`: " in card
    assert "unknown to rotation-vit" not in card
    hub_name = {"imagenette": "frgfm/imagenette", "cifar10": "uoft-cs/cifar10"}.get(source)
    if hub_name:
        assert yaml.safe_load(card.split("---\n")[1])["datasets"] == [hub_name]


def test_a_repository_with_files_is_left_alone_unless_asked(
    hub: UploadHub, publication: Publication
) -> None:
    hub.repositories[REPOSITORY] = {".gitattributes": b"", "model.safetensors": b"theirs"}
    with pytest.raises(PublishError, match=r"has files already, such as model\.safetensors\. Add"):
        publish(publication)
    assert hub.repositories[REPOSITORY]["model.safetensors"] == b"theirs"
    assert hub.commits == []
    publish(publication, update=True)
    assert hub.repositories[REPOSITORY]["model.safetensors"] != b"theirs"


def test_what_an_interrupted_attempt_left_is_no_obstacle(
    hub: UploadHub, publication: Publication
) -> None:
    hub.refuse["/commit/"] = 503
    with pytest.raises(PublishError, match=r"Nothing was published: .* \(503\)"):
        publish(publication)
    assert set(hub.repositories[REPOSITORY]) == {".gitattributes"}
    hub.refuse.clear()
    publish(publication)
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("create", 401, r"does not accept the token \(401\)"),
        ("create", 403, r"may not write to someone/rotation\.vit_2 \(403\)"),
        ("create", 500, r"has a problem of its own \(500\)"),
        ("preupload", 403, r"may not write to .* \(403\)"),
        ("/lfs/objects", 403, r"may not write to .* \(403\)"),
        ("/large/", 403, r"may not write to .* \(403\)"),
        ("commit", 401, r"does not accept the token \(401\)"),
    ],
)
def test_a_refusal_is_one_clear_line(
    hub: UploadHub, publication: Publication, where: str, status: int, message: str
) -> None:
    hub.refuse[where] = status
    with pytest.raises(PublishError, match=message) as error:
        publish(publication)
    assert "\n" not in str(error.value)
    assert hub.commits == []


def test_without_a_token_or_a_hub_it_says_so(
    publication: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PublishError, match="needs a token"):
        publish(publication)
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # and nobody listens at the endpoint of the tests
    with pytest.raises(PublishError, match=r"http://127\.0\.0\.1:9 could not be reached"):
        publish(publication)


def test_mistakes_are_found_before_anything_is_sent(run: FinishedRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--repo must be owner/name, got 'name'"):
        assemble(run, "name")
    with pytest.raises(ConfigError, match="finetune-2"):
        assemble(run, REPOSITORY, stage="finetune-3")
    with pytest.raises(
        ModelError, match=r"must have a model of report; it has models of: pretrain"
    ):
        assemble(run, REPOSITORY, stage="report")
    weights = run.stage_directory("from_scratch") / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
            assemble(run, REPOSITORY, stage="from-scratch")
    finally:
        weights.write_bytes(whole)


def test_names_from_outside_cannot_write_markdown(run: FinishedRun) -> None:
    run.results["data"].update(pretrain="folder:a`\n# Heading", transfer="folder:b")
    card = assemble(run, REPOSITORY, stage="pretrain").card
    assert "- pretrained on: `folder:a # Heading`, " in card
