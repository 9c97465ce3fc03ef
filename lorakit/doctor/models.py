"""Models that need no network."""

from collections.abc import Iterator

from lorakit.doctor.finding import CheckResult, gib
from lorakit.model.bundled_models import BUNDLED_MODELS, bundled_file

_SHOWN = 10


def carried() -> Iterator[CheckResult]:
    """The models that a package carries, and whether the package has been fetched."""
    for name, carrier in BUNDLED_MODELS.items():
        here = bundled_file(carrier).is_file()
        where = "in lorakit's cache" if here else "fetched by pip when a recipe asks for it"
        yield CheckResult("carried", "ok", f"{name}, by {carrier.package} {carrier.version}: {where}")


def cached() -> Iterator[CheckResult]:
    """The models in the hub's own cache, the largest first."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = [item for item in scan_cache_dir().repos if item.repo_type == "model"]
    except CacheNotFound:
        repositories = []
    repositories.sort(key=lambda item: -item.size_on_disk)
    figures = {"models": {item.repo_id: item.size_on_disk for item in repositories}}
    if not repositories:
        yield CheckResult("hub's cache", "ok", "holds no model yet", figures=figures)
        return
    named = [f"{item.repo_id} ({gib(item.size_on_disk)})" for item in repositories[:_SHOWN]]
    more = f", and {len(repositories) - _SHOWN} more" if len(repositories) > _SHOWN else ""
    yield CheckResult("hub's cache", "ok", f"{len(repositories)} models: {', '.join(named)}{more}", figures=figures)


def known() -> Iterator[CheckResult]:
    """The well-known hub models whose sizes are bundled, for `lorakit plan`."""
    from lorakit.plan.known_models import known_models

    ids = sum(len(model.ids) for model in known_models())
    yield CheckResult(
        "known sizes", "ok", f"{ids} hub models can be planned without their files", figures={"models": ids}
    )
