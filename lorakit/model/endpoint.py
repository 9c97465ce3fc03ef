"""A model behind an address: an OpenAI-compatible server, and which of its models is meant (`URL#NAME`)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from lorakit.errors import UserError
from lorakit.model.endpoint_requests import Address, request_once
from lorakit.progress import Progress
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.problem import one_line

KEYS = ("LORAKIT_API_KEY", "OPENAI_API_KEY")
"""The variables that may hold a server's key, the first that is set."""
_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=//)[^/?#]*@")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SHOWN = 20
# Of an entry of /v1/models: what is of the moment and not of the model. llama.cpp and vLLM write the time of the
# request as `created`, and vLLM a new id of its permission.
_OF_THE_MOMENT = ("created", "permission")


@dataclass(frozen=True)
class Endpoint:
    """One model of a server. `listing`: what the server says of it, empty where it lists no models; `server`: its
    `Server` header."""

    address: Address
    model: str
    listing: Mapping[str, Any] = field(default_factory=dict, compare=False)
    server: str | None = field(default=None, compare=False)

    @property
    def url(self) -> str:
        """The address as it may be shown."""
        return self.address.shown

    def identity(self) -> dict[str, Any]:
        """What is known of what answers."""
        about = {key: value for key, value in self.listing.items() if key not in _OF_THE_MOMENT}
        return {"url": self.url, "model": self.model, "server": self.server, "listing": about}


def is_endpoint(given: str) -> bool:
    """Whether an argument is an address."""
    return _SCHEME.match(given) is not None


def shown_address(given: str) -> str:
    """An address without its user and password."""
    return _CREDENTIALS.sub("***@", given)


def short_address(given: str) -> str:
    """Host and port of an address, and the name after `#`: what tables call the model."""
    try:
        parts = urlsplit(shown_address(given))
    except ValueError:
        return shown_address(given)  # which is refused later, with the reason
    return parts.netloc.rpartition("@")[2] + (f"#{parts.fragment}" if parts.fragment else "")


def open_endpoint(given: str, progress: Progress) -> Endpoint:
    """The model that `http(s)://host:port/v1` or `...#NAME` means. The server is asked for its models; a UserError
    where it cannot be reached, or serves no or several models and none or another is named."""
    address, name = parse_address(given)
    if address.key and not address.local and address.shown.startswith("http:"):
        progress.warn(f"{address.shown}: the key goes to this server unencrypted. Write https:// if it takes that")
    listed, server = _list_models(address, may_lack=name is not None)
    if listed is None:
        assert name is not None
        return Endpoint(address, name, server=server)
    by_name = {alias: entry for entry in listed for alias in _names(entry)}
    names = [str(entry["id"]) for entry in listed]
    there = one_line(", ".join(names[:_SHOWN]), 600) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")
    if name is None:
        if not names:
            raise UserError(f"{address.shown}: the server serves no model. Load one, or write its name: URL#NAME.")
        if len(names) > 1:
            what = f"the server serves {len(names)} models: {there}"
            raise UserError(
                f"{address.shown}: {what}. Write which one is meant: {address.shown}#{one_line(names[0], 100)}"
            )
        name = names[0]
        progress.say(f"{address.shown}: the server serves one model, {one_line(name, 200)}")
    elif name not in by_name:
        near = nearest(name, list(by_name))
        remedy = f" Did you mean {near}?" if near else ""
        raise UserError(f"{address.shown}: the server serves no model {name}; it serves {there or 'none'}.{remedy}")
    return Endpoint(address, name, by_name[name], server)


def parse_address(given: str) -> tuple[Address, str | None]:
    """The address in an argument, with its key, and the model's name after `#`, if any."""
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port  # a port that is no number is an error here
    except ValueError as error:
        # Whatever stands before an @ may be a password, however badly the rest is written.
        shown = re.sub(r"(?<=//).*@", "***@", given)
        reason = re.sub(r"'.*'", "", str(error)).strip()
        raise UserError(f"{shown}: is not an address ({reason}). Write http://host:port/v1.") from error
    shown = shown_address(given)
    if not host:
        raise UserError(f"{shown}: has no host. Write http://host:port/v1.")
    if parts.query:
        raise UserError(f"{shown_address(given.partition('?')[0])}: has a query (?...). Write http://host:port/v1.")
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port is not None else ""
    url = urlunsplit((parts.scheme.lower(), place, parts.path.rstrip("/"), "", ""))
    user = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    local = host in _LOOPBACK or host.startswith("127.")
    return Address(url, None if user else _key(), user, local), parts.fragment or None


def _key() -> str | None:
    for variable in KEYS:
        key = os.environ.get(variable, "").strip()
        if key:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(f"{variable}: is not a key: it has white space or characters beyond ASCII.")
            return key
    return None


def _list_models(address: Address, may_lack: bool) -> tuple[list[dict[str, Any]] | None, str | None]:
    """What the server says of each of its models, and its `Server` header. With `may_lack` None of a server that has no
    such list."""
    reply = request_once(address, "/models", none_if_missing=may_lack)
    if reply is None:
        return None, None
    entries = reply.body.get("data")
    if not isinstance(entries, list) or not all(isinstance(one, dict) and one.get("id") for one in entries):
        what = f"its list of models cannot be read: {one_line(str(reply.body), 120)}"
        raise UserError(f"{address.shown}: {what}. Is it the address of an OpenAI-compatible server, ending in /v1?")
    return entries, reply.server


def _names(entry: Mapping[str, Any]) -> list[str]:
    """The names under which a model may be asked for; llama.cpp lists aliases."""
    aliases = entry.get("aliases")
    return [str(entry["id"]), *(map(str, aliases) if isinstance(aliases, list) else ())]
