"""Publishing a finished model on the Hugging Face Hub: weights, card and results, in one commit."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token
from huggingface_hub.errors import HfHubHTTPError

from data.specs import public_source
from models.export import CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE
from training.errors import PublishError
from training.finished_models import FinishedRun, check_unchanged
from training.model_card import render_card
from training.settings import ConfigError
from training.stage_files import MODEL

CARD = "README.md"

_NETWORK_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
"""Of the HTTP library that this release of huggingface_hub uses."""

_OF_EVERY_REPOSITORY = {".gitattributes"}
"""What the Hub itself puts into a new repository."""

_SOURCES = (
    ("data", "source"),
    ("data", "test_source"),
    ("transfer", "source"),
    ("transfer", "test_source"),
)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is to be published.

    Attributes:
        repository: `owner/name`.
        stage: Whose model it is.
        files: Content or path of each file, by its name in the repository.
    """

    repository: str
    stage: str
    files: Mapping[str, bytes | Path]

    @property
    def card(self) -> str:
        """The model card."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def assemble(
    run: FinishedRun, repository: str, *, stage: str | None = None, data_licence: str | None = None
) -> Publication:
    """Gather what is to be published of a run; uses no network.

    Of results and settings everything is published but where it lay: paths, addresses' users and
    tokens, names of single images, and the settings of the tracking.

    Args:
        run: The record of the run.
        repository: `owner/name` on the Hub.
        stage: Whose model; None takes the one that was best on val, or pretrain's.
        data_licence: What the card says of it; None says what is known.

    Raises:
        ConfigError: If `repository` or `stage` is misspelt.
        ModelError: If the model is missing or damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise ConfigError(f"--repo must be owner/name, got {repository!r}.")
    chosen = run.choose(stage)
    directory = run.stage_directory(chosen)
    check_unchanged(directory)
    why = "" if stage or chosen == "pretrain" else "the best on val"
    card = render_card(run, chosen, repository=repository, why=why, data_licence=data_licence)
    model = directory / MODEL
    files: dict[str, bytes | Path] = {
        CARD: card.encode(),
        **{name: model / name for name in (CONFIG_FILE, WEIGHTS_FILE, PROCESSOR_FILE)},
        "results.json": json.dumps(_public_results(run.results), indent=2).encode() + b"\n",
    }
    if (run.directory / "config.yaml").is_file():
        files["config.yaml"] = _public_settings(run.directory / "config.yaml")
    return Publication(repository=repository, stage=chosen, files=files)


def publish(publication: Publication, *, private: bool = False, update: bool = False) -> str:
    """Push everything in one commit, so that the repository has all of it or nothing.

    Args:
        publication: What to push.
        private: Make a new repository private.
        update: Allow a repository that has files; what it had stays in its history.

    Returns:
        The address of the commit.

    Raises:
        PublishError: If there is no token, the Hub refuses or cannot be reached, or the repository
            has files already.
    """
    repository = publication.repository
    if get_token() is None:
        raise PublishError(
            "Publishing needs a token of the Hub that may write. Set HF_TOKEN, or run "
            "`hf auth login`."
        )
    api = HfApi(library_name="rotation-vit")
    try:
        created = _create(api, repository, private=private)
        if not created and not update:
            there = set(api.list_repo_files(repository)) - _OF_EVERY_REPOSITORY
            if there:
                raise PublishError(
                    f"{repository} has files already, such as {min(there)}. Add --update to "
                    "publish over them (they stay in its history), or choose another --repo."
                )
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in publication.files.items()
            ],
            commit_message=f"Publish the model of {publication.stage.replace('_', '-')}",
        )
    except (_NETWORK_ERROR, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, PublishError):
            raise
        raise PublishError(f"Nothing was published: {_in_words(error, api, repository)}") from error
    return str(commit.commit_url)


def _create(api: HfApi, repository: str, *, private: bool) -> bool:
    """Make the repository; return whether it is new."""
    try:
        api.create_repo(repository, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.CONFLICT:
            raise
        return False
    return True


def _in_words(error: BaseException, api: HfApi, repository: str) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one file's upload
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, _NETWORK_ERROR | OSError):
            return f"{api.endpoint} could not be reached ({reason}). Try again later."
        return f"{reason.rstrip('.')}."
    status = error.response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"{api.endpoint} does not accept the token (401). Set HF_TOKEN to a valid one, or run "
            "`hf auth login`."
        )
    if status == HTTPStatus.FORBIDDEN:
        return (
            f"the token may not write to {repository} (403). Use one with the permission to write, "
            "or a --repo of your own."
        )
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
        return f"{api.endpoint} has a problem of its own ({status}). Run the command again later."
    said = error.server_message or error.response.reason_phrase
    return f"{api.endpoint} refused it ({status}): {' '.join(said.split()).rstrip('.')}."


def _public_results(results: Mapping[str, Any]) -> dict[str, Any]:
    public = copy.deepcopy(dict(results))
    for role in ("pretrain", "transfer"):
        public["data"][role] = public_source(public["data"][role])
    for row in public["stages"].values():
        for name in ("directory", "skipped_examples", "sources"):
            row.pop(name, None)
        if isinstance(row.get("source"), str):
            row["source"] = public_source(row["source"])
    return public


def _public_settings(path: Path) -> bytes:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("tracking", None)
    for section, name in _SOURCES:
        if values.get(section, {}).get(name):
            values[section][name] = public_source(values[section][name])
    return yaml.safe_dump(values, sort_keys=False).encode()
