"""Models that need no network, and whether a recipe's base model is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.model.offline import CARRIERS, carried_file
from lorakit.plan.doctor.finding import Finding, gib
from lorakit.plan.doctor.packages import installed

if TYPE_CHECKING:
    from lorakit.recipe.schema import Model

_SHOWN = 10


def carried() -> Iterator[Finding]:
    """The models that a package carries, and whether the package has been fetched."""
    for name, carrier in CARRIERS.items():
        here = carried_file(carrier).is_file()
        where = "in lorakit's cache" if here else "fetched by pip when a recipe asks for it"
        yield Finding("carried", "ok", f"{name}, by {carrier.package} {carrier.version}: {where}")


def cached() -> Iterator[Finding]:
    """The models in the hub's own cache, the largest first."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = [item for item in scan_cache_dir().repos if item.repo_type == "model"]
    except CacheNotFound:
        repositories = []
    repositories.sort(key=lambda item: -item.size_on_disk)
    figures = {"models": {item.repo_id: item.size_on_disk for item in repositories}}
    if not repositories:
        yield Finding("hub's cache", "ok", "holds no model yet", figures=figures)
        return
    named = [f"{item.repo_id} ({gib(item.size_on_disk)})" for item in repositories[:_SHOWN]]
    more = f", and {len(repositories) - _SHOWN} more" if len(repositories) > _SHOWN else ""
    yield Finding("hub's cache", "ok", f"{len(repositories)} models: {', '.join(named)}{more}", figures=figures)


def known() -> Iterator[Finding]:
    """The well-known hub models whose sizes are bundled, for `lorakit plan`."""
    from lorakit.plan.known import known_models

    ids = sum(len(model.ids) for model in known_models())
    yield Finding("known sizes", "ok", f"{ids} hub models can be planned without their files", figures={"models": ids})


def base(model: "Model") -> Iterator[Finding]:
    """Whether a recipe's base model is here, or can be fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    name = model.base
    if name.endswith(".gguf") and not installed("gguf"):
        yield Finding("base", "broken", f"{name} needs the package gguf", "pip install 'lorakit[gguf]'")
    elif Path(name).exists():
        yield Finding("base", "ok", f"{name} is here")
    elif isinstance(try_to_load_from_cache(name, "config.json", revision=model.revision), str):
        yield Finding("base", "ok", f"{name} is in the hub's cache")
    elif name in CARRIERS:
        yield Finding("base", "ok", f"{name} comes from the hub or, without it, from {CARRIERS[name].package}")
    elif constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or write a local folder as model.base"
        yield Finding("base", "broken", f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    else:
        yield Finding("base", "note", f"{name} is not here yet: it is fetched from the hub when it is first used")
