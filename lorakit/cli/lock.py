"""`lorakit lock`"""

from lorakit.amounts import counted
from lorakit.cli.options import Json, Quiet, RecipePath, quoted


def lock(recipe: RecipePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Pin what a recipe reads: write NAME.lock.yaml beside it, to which [cyan]lorakit train --locked[/cyan] holds.

    The lock has the recipe's keys, the sha256 of every file that it reads (rows, templates, the recipes it extends, the
    base's weights and tokenizer), hub commits where the hub or its cache knows them, and the versions of the packages.
    """
    from lorakit import console
    from lorakit.recipe.load import load
    from lorakit.recipe.problem import show_path
    from lorakit.share.lock import write_lock

    path, content, changes = write_lock(load(recipe), console.Terminal(quiet))
    if as_json:
        console.result_json({"lock": str(path), "changed": changes, **content})
        return
    for change in changes:
        console.result_wrapped(change, under="    ", begin="  changed: ")
    others = len(content["inputs"]) + len(content["extends"])
    counts = [counted(len(content["data"]["files"]), "data file"), counted(len(content["base"]["sha256"]), "base file")]
    counts += [counted(others, "other file"), counted(len(content["versions"]), "version")]
    console.result(f"lock: {show_path(path)} ({', '.join(counts)})\nnext: lorakit train {quoted(recipe)} --locked")
