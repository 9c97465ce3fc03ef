"""The Hugging Face hub: whether it is asked at all, with which token, and, only when told to, whether it answers."""

import os
import time
from collections.abc import Iterator

from lorakit.doctor.finding import CheckResult, reason

_SECONDS = 5.0


def settings() -> Iterator[CheckResult]:
    """The variables of the environment that decide on the hub. A token is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield CheckResult("offline", "note", "HF_HUB_OFFLINE is set: only models on this machine can be used")
    if os.environ.get("HF_TOKEN"):
        yield CheckResult("token", "ok", "HF_TOKEN is set")
    elif get_token():
        yield CheckResult(
            "token", "ok", "HF_TOKEN is not set; the hub's library finds a token that was stored by a login"
        )
    else:
        yield CheckResult("token", "note", "HF_TOKEN is not set: gated and private models cannot be fetched")


def not_asked() -> Iterator[CheckResult]:
    """What is said of the network where it must not be used."""
    yield CheckResult("reachable", "ok", "not asked (--network asks)")


def reachable() -> Iterator[CheckResult]:
    """Whether the hub answers within seconds, and takes the token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield CheckResult("reachable", "note", "not asked, since HF_HUB_OFFLINE is set")
        return
    place, begun = constants.ENDPOINT, time.perf_counter()
    try:
        status = _status(f"{place}/api/models?limit=1", None)
    except Exception as error:  # whatever the HTTP library raises: names, certificates, proxies, timeouts
        remedy = "look at the network and HTTPS_PROXY; HF_ENDPOINT names a mirror; a local folder needs no hub"
        yield CheckResult("reachable", "broken", f"{place} does not answer: {reason(error)}", remedy)
        return
    seconds = time.perf_counter() - begun
    if status >= 500:
        yield CheckResult("reachable", "broken", f"{place} answers with HTTP {status}", "try again later")
        return
    yield CheckResult("reachable", "ok", f"{place} answers in {seconds:.1f} s", figures={"seconds": seconds})
    token = get_token()
    if token:
        status = _status(f"{place}/api/whoami-v2", token)
        if status == 401:
            yield CheckResult(
                "token", "broken", f"{place} refuses the token", "make a new one on the hub, set it as HF_TOKEN"
            )
        else:
            yield CheckResult("token", "ok", f"{place} takes the token")


def _status(address: str, token: str | None) -> int:
    """The HTTP status of an answer, asked for as the hub's library asks, with its proxies and certificates."""
    from huggingface_hub import get_session

    headers = {"authorization": f"Bearer {token}"} if token else {}
    return int(get_session().get(address, headers=headers, timeout=_SECONDS).status_code)
