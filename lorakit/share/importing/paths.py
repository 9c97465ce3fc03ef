"""Paths of a config, which its tool reads from the folder that it runs in, as a recipe means them."""

import os
import re
from pathlib import Path

from lorakit.share.importing.conversion import Conversion

_ADDRESS = re.compile(r"(?i)\b(?:https?|s3|gs|gcs|hf|abfs|az|oci|modelscope)://")
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # of common file systems
_VARIABLE = re.compile(r"\$\{?\w|\{\{|<\w[^>]*>")


def remote_reason(text: str) -> str:
    """Why a path is none that a recipe can name; empty where it is."""
    if _ADDRESS.search(text):
        return "it is an address, and a recipe names files, folders and hub ids"
    if _VARIABLE.search(text):
        return "it is a placeholder or holds a variable, and a recipe reads none"
    if len(text) > _LONGEST_PATH or any(len(os.fsencode(name)) > _LONGEST_NAME for name in text.split("/")):
        return "it is too long for a path"
    return "it has a NUL character" if "\0" in text else ""


def find_local(c: Conversion, text: str) -> Path | None:
    """The file or folder that a text means: from the working directory, as the tool does, else beside the config."""
    for folder in (Path.cwd(), c.config.folder):
        path = os.path.normpath(os.path.join(folder, os.path.expanduser(text)))  # noqa: PTH111, PTH118
        if os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long)
            return Path(path)
    return None


def local_path(c: Conversion, text: str, is_file: bool = False) -> str:
    """An absolute path for what is here or can only be a path (`is_file`: is surely one); a hub id as it is."""
    path = find_local(c, text)
    if path is not None:
        return str(path)
    looks_so = text.startswith(("/", "./", "../", "~")) or text.endswith("/") or text.count("/") > 1 or is_file
    return os.path.normpath(os.path.join(Path.cwd(), os.path.expanduser(text))) if looks_so else text  # noqa: PTH111, PTH118


def is_local(c: Conversion, reference: str) -> bool:
    """Whether a reference that `local_path` has made is a path."""
    return os.path.isabs(reference)  # noqa: PTH117
