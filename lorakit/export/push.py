"""Pushing an export for the hub: its files and no others, in one commit, to a repository that may be written to."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_token
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from lorakit import __version__
from lorakit.atomic_io import files_in, is_draft, read_json_object, read_own_json, sha256_of
from lorakit.errors import LorakitError, UserError, first_line
from lorakit.export.private_text import find_secrets
from lorakit.model.model_card import REPOSITORY
from lorakit.run_dir import EXPORT

if TYPE_CHECKING:
    from lorakit.export.source import ExportSource


CARD = "README.md"
_OF_THE_HUB = {".gitattributes"}  # which it writes into each new repository


@dataclass(frozen=True)
class Upload:
    """What goes to a repository: an export's folder and its files with their bytes."""

    folder: Path
    repository: str
    files: dict[str, int]

    @property
    def card(self) -> str:
        """The card, which names the repository where it is pushed to."""
        return (self.folder / CARD).read_text(encoding="utf-8").replace(REPOSITORY, self.repository)

    def content(self, name: str) -> bytes | Path:
        """What is sent under a name: the file, but for the card, and the document that has the card's sha256."""
        if name == CARD:
            return self.card.encode()
        if name != EXPORT:
            return self.folder / name
        document, card = read_own_json(self.folder / EXPORT), self.card.encode()
        document["sha256"][CARD] = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class PushResult:
    """What was pushed, and where it is."""

    url: str
    commit: str
    private: bool
    removed: list[str]


def check_repository(name: str) -> None:
    """Refuse a name that the hub would not take, by its library's own rules, or one without its owner."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise UserError(f"{name!r}: is not a name of a repository: {first_line(error)}.") from error
    if "/" not in name:
        raise UserError(f"{name}: names no owner. Write it with your user name or organization: ORG/{name}.")


def check_login() -> None:
    """Refuse to begin where nothing can be sent: offline, or without the hub's own login."""
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or look at --dry-run.")
    if not get_token():
        raise UserError("pushing needs a token of the hub. Run hf auth login, or set HF_TOKEN; --dry-run needs none.")


def read_upload(folder: Path, repository: str) -> Upload:
    """The files of an export. A UserError where it has others, lacks one, or one was changed; the card may be."""
    document = read_own_json(folder / EXPORT)
    again = f"Export it again with lorakit export --to {document.get('target')} --overwrite."
    if not str(document.get("target")).startswith("huggingface"):
        raise UserError(f"{folder}: is an export for {document.get('target')}, not for the hub. Export huggingface.")
    present = [name for name in files_in(folder) if not is_draft(Path(name))]
    written = document.get("files", [])
    if others := sorted(set(present) - set(written)):
        raise UserError(f"{folder / others[0]}: is not of the export, and would be pushed. Move it away.")
    if missing := sorted(set(written) - set(present)):
        raise UserError(f"{folder / missing[0]}: is missing. {again}")
    for name, facts in document.get("sha256", {}).items():
        if name != CARD and sha256_of(folder / name) != facts["sha256"]:
            raise UserError(f"{folder / name}: was changed since the export. {again}")
    if secrets := find_secrets(folder, present):
        raise UserError(
            f"{folder}: holds {secrets[0].partition(': ')[2]}, in {secrets[0].partition(': ')[0]}. Remove it."
        )
    return Upload(folder, repository, {name: (folder / name).stat().st_size for name in present})


def refuse_earlier(folder: Path, source: "ExportSource") -> None:
    """Refuse an export that is there and is of other weights than the source has now."""
    adapter = source.adapter / "adapter_model.safetensors" if source.adapter else None
    document = read_own_json(folder / EXPORT)
    if document.get("adapter_sha256") != (sha256_of(adapter) if adapter and adapter.is_file() else None):
        raise UserError(
            f"{folder}: is the export of other weights than {source.folder} has now. Export it again with lorakit "
            f"export --to {document.get('target')} --overwrite."
        )


def push(upload: Upload, public: bool, overwrite: bool, message: str | None) -> PushResult:
    """Send the files in one commit to the repository, which is made where there is none. A UserError where it is not
    lorakit's, or seen by others than those it is meant for; a LorakitError where the hub does not answer."""
    api = HfApi(library_name="lorakit", library_version=__version__)
    with _explaining(upload.repository):
        info = _find(api, upload.repository)
        removed: list[str] = []
        if info is None:
            api.create_repo(upload.repository, private=not public)
        else:
            _refuse(info, upload.repository, public, overwrite)
            removed = sorted(_earlier_files(api, info) - upload.files.keys())
        commit = api.create_commit(
            upload.repository,
            [
                *(CommitOperationAdd(name, upload.content(name)) for name in sorted(upload.files)),
                *(CommitOperationDelete(name) for name in removed),
            ],
            commit_message=message or f"{upload.folder.name} by lorakit {__version__}",
            parent_commit=info.sha if info else None,
        )
    private = not public if info is None else bool(info.private)
    return PushResult(f"{api.endpoint}/{upload.repository}", commit.oid, private, removed)


def _find(api: HfApi, repository: str) -> ModelInfo | None:
    """What the hub knows of a repository; None where there is none that this login sees."""
    try:
        return api.model_info(repository)
    except errors.GatedRepoError:  # there is one, which asks for permission
        raise
    except errors.RepositoryNotFoundError:
        return None


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or []} - _OF_THE_HUB


def _is_ours(info: ModelInfo) -> bool:
    return EXPORT in _names(info) and "lorakit" in (info.tags or [])


def _refuse(info: ModelInfo, repository: str, public: bool, overwrite: bool) -> None:
    """Refuse a repository with other content, or one that is public where a private one is meant, or the reverse."""
    if _names(info) and not _is_ours(info) and not overwrite:
        raise UserError(
            f"{repository}: exists, and was not made by lorakit push. Choose another name, or write over its files "
            "with --overwrite."
        )
    if public == bool(info.private):
        state, remedy = ("private", "Leave --public out, or change it") if public else ("public", "Write --public")
        raise UserError(f"{repository}: exists and is {state}. {remedy}{' on the hub' if public else ''}.")


def _earlier_files(api: HfApi, info: ModelInfo) -> set[str]:
    """The files that an earlier push put there."""
    if not _is_ours(info):
        return set()
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(info.id, EXPORT, revision=info.sha, local_dir=folder)
        listed: Any = (read_json_object(Path(path)) or {}).get("files")
    return _names(info) & set(listed if isinstance(listed, list) else [])


@contextmanager
def _explaining(repository: str) -> Iterator[None]:
    """The hub's refusals in a sentence each."""
    try:
        yield
    except LorakitError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.") from error
    except errors.HfHubHTTPError as error:
        raise _refusal(error, repository) from error
    except (errors.HTTPError, OSError) as error:
        raise LorakitError(
            f"the hub cannot be reached at {constants.ENDPOINT}: {first_line(error)}. Try again."
        ) from error
    except (ValueError, RuntimeError) as error:  # of the hub's answers, and of hf_xet, which sends large files
        raise LorakitError(f"{repository}: was not pushed: {first_line(error)}.") from error


def _refusal(error: errors.HfHubHTTPError, repository: str) -> LorakitError:
    status = error.response.status_code
    owner = repository.partition("/")[0]
    if status == 401:
        return UserError("the hub does not know the token. Run hf auth login again, or set another HF_TOKEN.")
    if status == 403:
        return UserError(f"{repository}: the token may not write there. Give one with the right to write to {owner}.")
    if status == 404:
        return UserError(f"{repository}: the hub knows no user or organization {owner} that this token may write to.")
    if status == 409:
        return LorakitError(f"{repository}: another push went on meanwhile. Try again.")
    reason = error.server_message or first_line(error)
    return LorakitError(f"{repository}: was not pushed: the hub answered {status}: {reason.rstrip('.')}.")
