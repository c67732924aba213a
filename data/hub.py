"""What a data set on the Hugging Face Hub consists of: its Parquet files, at one commit."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from data.catalogue import RemoteFile
from data.folder_source import SPLIT_NAMES
from data.patience import Patience, Stop, TryAgainError, asked_wait, persist, try_again
from data.records import DatasetError, Split
from data.remote_files import gated, offline
from data.specs import KNOWN, HubAddress, hub_address

CONVERTED = r"(?P<config>[^/]+)/(?P<partial>partial-)?(?P<split>[^/]+)/\d+\.parquet"
"""Names on the branch `refs/convert/parquet`, where the Hub keeps what it converted."""

_CONVERT_BRANCH = "refs/convert/parquet"
Result = TypeVar("Result")


def list_files(spec: str, patience: Patience, stop: Stop) -> tuple[str, list[RemoteFile]]:
    """Find the files of a data set on the Hub.

    Args:
        spec: Value of `data.source`.
        patience: How often and how long the Hub is asked.
        stop: Asked while waiting; true ends it.

    Returns:
        Repository and commit, and the files in the order of their images; rows are not known yet.

    Raises:
        DatasetError: If there is no such data set, revision or configuration, if its terms are
            not accepted, or if it has no Parquet files.
        DownloadError: If the Hub does not answer as often as it is asked.
    """
    address = hub_address(spec)

    def ask(action: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            with _errors(address):
                return action()

        return persist(attempt, f"the list of files of {address.repository}", patience, stop)

    info = ask(lambda: _info(address, patience))
    if info.gated:  # its list is open to all, its files are not
        ask(lambda: _check_access(address))
    siblings = {each.rfilename: each for each in info.siblings or ()}
    if spec in KNOWN and KNOWN[spec].files:
        chosen = _by_pattern(siblings, KNOWN[spec].files or "")
    elif any(re.fullmatch(CONVERTED, name) for name in siblings):
        chosen = _converted(siblings, address)
    else:
        chosen = ask(lambda: _by_datasets(address, info.sha, siblings))
    files = []
    for name, split in _our_splits(chosen, address):
        found = siblings[name]
        if found.size is None:
            raise DatasetError(f"{address.repository} must list the size of {name}, it does not.")
        checksum = f"sha256:{found.lfs.sha256}" if found.lfs else f"git:{found.blob_id}"
        files.append(
            RemoteFile(
                name=name,
                url=_url(address.repository, name, info.sha),
                size=found.size,
                checksum=checksum,
                split=split,
            )
        )
    return f"{address.repository}@{info.sha}", files


def _info(address: HubAddress, patience: Patience) -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="rotation-vit").dataset_info(
        address.repository,
        revision=address.revision,
        files_metadata=True,
        timeout=patience.stall_seconds,
    )


def _check_access(address: HubAddress) -> None:
    from huggingface_hub import HfApi

    HfApi(library_name="rotation-vit").auth_check(address.repository, repo_type="dataset")


def _url(repository: str, name: str, commit: str) -> str:
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(repository, name, repo_type="dataset", revision=commit))


def _by_pattern(names: Any, pattern: str) -> dict[str, str]:
    found = {name: re.fullmatch(pattern, name) for name in sorted(names)}
    return {name: match["split"] for name, match in found.items() if match}


def _converted(names: Any, address: HubAddress) -> dict[str, str]:
    """Return the files of a configuration in the layout of the Hub's own conversion."""
    matches = [found for name in sorted(names) if (found := re.fullmatch(CONVERTED, name))]
    configs = sorted({match["config"] for match in matches})
    config = address.config or (configs[0] if len(configs) == 1 else None)
    if config not in configs:
        raise _unknown_config(address, configs)
    chosen = [match for match in matches if match["config"] == config]
    if any(match["partial"] for match in chosen):
        raise DatasetError(
            f"{address.repository} must be converted as a whole to be read from "
            f"{_CONVERT_BRANCH}, the Hub has converted only a part of {config}. Use the main "
            f"branch (hub:{address.repository}) if it has Parquet files, or download it yourself."
        )
    return {match.group(): match["split"] for match in chosen}


def _by_datasets(address: HubAddress, commit: str, names: Collection[str]) -> dict[str, str]:
    """Return the files that `datasets` would read, as the card or their names say."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            address.repository, name=address.config, revision=commit
        )
    except ValueError as error:
        configs = _configs(error)
        if configs:
            raise _unknown_config(address, configs) from error
        raise _no_tables(address) from error
    except FileNotFoundError as error:
        if any(name.endswith(".parquet") for name in names):
            raise TryAgainError(
                f"its files were not found, though they are listed: {error}"
            ) from error
        raise _no_tables(address) from error
    except RuntimeError as error:  # a script, which `datasets` no longer runs
        raise _no_tables(address) from error
    prefix = f"hf://datasets/{address.repository}@{commit}/"
    found = {
        str(path).removeprefix(prefix): str(split)
        for split, paths in (builder.config.data_files or {}).items()
        for path in paths
    }
    if not found or not all(name.endswith(".parquet") for name in found):
        raise _no_tables(address)
    return found


def _configs(error: Exception) -> list[str]:
    """Return the configurations that an error message of `datasets` offers."""
    text = str(error)
    listed = re.search(r"(?:available configs|Available):? *(?:are)?:? *\[(.*?)\]", text, re.S)
    return re.findall(r"'([^']+)'", listed[1]) if listed else []


def _unknown_config(address: HubAddress, configs: list[str]) -> DatasetError:
    got = f"{address.config!r} is none of them" if address.config else "none was named"
    branch = f"@{address.revision}" if address.revision else ""
    return DatasetError(
        f"{address.repository} must be given with one of its configurations "
        f"({', '.join(configs[:20])}), {got}. Write hub:{address.repository}{branch}:{configs[0]}."
    )


def _no_tables(address: HubAddress) -> DatasetError:
    way = (
        "Download it yourself and use folder:<path> or parquet:<glob>."
        if address.revision == _CONVERT_BRANCH
        else f"The Hub may have converted it: try hub:{address.repository}@{_CONVERT_BRANCH}."
    )
    return DatasetError(
        f"{address.repository} must have Parquet files with images at this revision, none were "
        f"found. {way}"
    )


def _our_splits(chosen: dict[str, str], address: HubAddress) -> Iterator[tuple[str, Split]]:
    """Yield the files that we read, train first; the official validation split is our test."""
    if not chosen:
        raise _no_tables(address)
    names = set(chosen.values())
    train = "train" if "train" in names else None
    if train is None and len(names) == 1:
        train = names.pop()  # one part, whatever it is called
    if train is None:
        raise DatasetError(
            f"{address.repository} must have a part called train, has {', '.join(sorted(names))}."
        )
    yield from ((name, "train") for name, split in chosen.items() if split == train)
    for test in ("validation", "val", "valid", "test"):
        if test in names and test != train:
            yield from (
                (name, SPLIT_NAMES.get(test, "test")) for name in chosen if chosen[name] == test
            )
            return


@contextmanager
def _errors(address: HubAddress) -> Iterator[None]:
    from huggingface_hub import errors

    repository, where = address.repository, address.revision or "its default branch"
    try:
        yield
    except errors.GatedRepoError as error:
        raise gated(repository) from error
    except errors.RepositoryNotFoundError as error:
        raise DatasetError(
            f"There must be a data set {repository} on the Hub, there is none that this account "
            "may see. Look at its name; for a private one set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DatasetError(f"{repository} must have the revision {where}, it has not.") from error
    except errors.OfflineModeIsEnabled as error:
        raise offline(repository) from error
    except errors.HfHubHTTPError as error:
        response = error.response
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            wait = asked_wait(response.headers.get("Retry-After"))
            raise TryAgainError(f"the Hub answered {response.status_code}", wait) from error
        raise DatasetError(
            f"The Hub must list the files of {repository}, it answered {response.status_code}. "
            "Look at HF_TOKEN, if it is set: an expired one is refused."
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise try_again(error) from error
