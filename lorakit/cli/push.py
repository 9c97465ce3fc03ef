"""`lorakit push`"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.amounts import counted, decimal_bytes
from lorakit.cli.options import BaseOption, Json, Quiet
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.export.push import PushResult, Upload
    from lorakit.progress import Progress


def push(
    given: Annotated[
        str,
        typer.Argument(metavar="X", help="The folder of a run, an adapter, a merged model, or an export for the hub."),
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the Hugging Face hub.")],
    merged: Annotated[bool, typer.Option("--merged", help="Push the merged model instead of the adapter.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make a public repository; by default it is private.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a repository that lorakit push did not make.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files, their sizes and the card, and send nothing.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="The commit's message.")
    ] = None,
    base: BaseOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send an adapter or a merged model with its card to the Hugging Face hub, in one commit.

    What is sent is the export [cyan]huggingface[/cyan] of X, which is made first where there is none, and no other
    file. The login is the hub's own: [cyan]hf auth login[/cyan], or HF_TOKEN.
    """
    from lorakit import console
    from lorakit.export.push import check_login, check_repository
    from lorakit.export.push import push as push_upload

    progress = console.Terminal(quiet)
    check_repository(repository)
    if not dry_run:
        check_login()
    with _open_upload(given, repository, merged, base, progress) as upload:
        result = None if dry_run else push_upload(upload, public, overwrite, message)
    if as_json:
        files = [{"name": name, "bytes": size} for name, size in upload.files.items()]
        sent = {"url": result.url, "commit": result.commit, "private": result.private} if result else {}
        removed = {"removed": result.removed} if result else {}
        console.result_json({"repository": repository, "dry_run": dry_run, **sent, "files": files, **removed})
    else:
        console.result("\n".join(_describe(upload, result, public)))


@contextmanager
def _open_upload(
    given: str, repository: str, merged: bool, base: str | None, progress: "Progress"
) -> "Iterator[Upload]":
    """The export to send, which is made where there is none; until the end nobody replaces it."""
    from lorakit.atomic_io import shared_lock
    from lorakit.export.push import read_upload
    from lorakit.run_dir import EXPORT

    folder = Path(given)
    if (folder / EXPORT).is_file():
        for option, value in {"--merged": merged, "--base": base}.items():
            if value:
                raise UserError(f"{option}: does nothing for an export, which is sent as it is. Leave it out.")
    else:
        folder = _export(given, merged, base, progress)
    with shared_lock(folder):
        yield read_upload(folder, repository)


def _export(given: str, merged: bool, base: str | None, progress: "Progress") -> Path:
    """The folder of the export of a run, an adapter or a model: the one that is there, or one that is made now."""
    from lorakit.cli.export import open_source
    from lorakit.export.push import refuse_earlier
    from lorakit.export.run import default_root, export
    from lorakit.recipe.export_target import parse_target

    target = parse_target("huggingface:merged" if merged else "huggingface")
    with open_source(given, base, None, progress) as source:
        folder = default_root(source.folder) / target.folder_name
        if folder.exists():
            refuse_earlier(folder, source)
        else:
            progress.say(f"exporting first, into {folder}")
            export(source, [target], folder.parent, False, progress)
    return folder


def _describe(upload: "Upload", result: "PushResult | None", public: bool) -> Iterator[str]:
    size = decimal_bytes(sum(upload.files.values()))
    if result is None:
        state = "public" if public else "private"
        yield f"would push to {upload.repository} ({state}), {counted(len(upload.files), 'file')}, {size}:"
        yield from (f"  {name}  {decimal_bytes(count)}" for name, count in upload.files.items())
        yield f"README.md:\n{upload.card}"
        return
    state = "private" if result.private else "public"
    yield f"pushed to {result.url} ({state}): {counted(len(upload.files), 'file')}, {size}"
    if result.removed:
        yield f"removed there what an earlier push had sent: {', '.join(result.removed)}"
