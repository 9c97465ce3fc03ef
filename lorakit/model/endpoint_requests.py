"""Requests to an OpenAI-compatible server: several at once, tried again where that may help, failures in a sentence.

No connection at the first contact is the user's to set right (a UserError), and so is what a server refuses with a
reason: address, key, name, row. A server that answers too late, breaks off or breaks down failed by itself (a
LorakitError).
"""

import asyncio
import json
import os
import re
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from lorakit.errors import LorakitError, UserError, first_line
from lorakit.recipe.problem import one_line

# Seconds: until a connection is there, until /v1/models answers, until a chat completion does (which comes at its end).
CONNECT_SECONDS, LIST_SECONDS, ANSWER_SECONDS = 10.0, 30.0, 600.0
AT_ONCE = 8
"""Requests at once. Servers answer several in about the time of one, and queue what they cannot take."""
_TRIES, _PAUSE, _LONGEST_PAUSE = 5, 0.5, 30.0
_BUSY = (429, 500, 502, 503, 504)
_TAGS = re.compile(r"<[^>]*>")
_REDACTED = "***"


@dataclass(frozen=True)
class Address:
    """Where a server is, and what opens it: a key, or a user with a password. `local`: on this machine, to which no
    proxy leads."""

    shown: str
    key: str | None = field(default=None, repr=False)
    user: tuple[str, str] | None = field(default=None, repr=False)
    local: bool = False

    def client(self, seconds: float) -> dict[str, Any]:
        """The arguments of a client of httpx2."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx2.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        return {"headers": headers, "auth": self.user, "timeout": timeout, "trust_env": not self.local}

    def redact(self, text: str) -> str:
        """A server's words, which may repeat the key."""
        for secret in (self.key, self.user and self.user[1]):
            if secret:
                text = text.replace(secret, _REDACTED)
        return text


@dataclass(frozen=True)
class ServerReply:
    """The JSON object that a server answered with, and its `Server` header."""

    body: dict[str, Any]
    server: str | None


def request_once(address: Address, path: str, none_if_missing: bool = False) -> ServerReply | None:
    """The answer to a GET: the first contact with a server. With `none_if_missing` None where there is no such path."""
    try:
        with httpx2.Client(**address.client(LIST_SECONDS)) as client:
            response = client.get(address.shown + path)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        kind = LorakitError if isinstance(error, httpx2.ReadTimeout) else UserError
        raise kind(_describe_failure(address, error, LIST_SECONDS)) from error
    if none_if_missing and response.status_code in (404, 405, 501):
        return None
    return _read(address, response, path)


async def post_all(
    address: Address,
    path: str,
    bodies: Sequence[Mapping[str, Any]],
    done: Callable[[int, ServerReply], None],
    places: Sequence[str],
) -> None:
    """POST every body; `done` gets each reply with its number as it comes. `places` name the bodies in errors. What is
    under way is cancelled at the first failure."""
    room = asyncio.Semaphore(AT_ONCE)
    async with httpx2.AsyncClient(**address.client(ANSWER_SECONDS)) as client:

        async def ask(number: int) -> None:
            async with room:
                reply = await _post(client, address, path, bodies[number], places[number])
            done(number, reply)

        tasks = [asyncio.ensure_future(ask(number)) for number in range(len(bodies))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def stream_events(address: Address, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
    """POST a body that asks for a stream; the JSON object of each server-sent event, as it comes. Of a server that does
    not stream the one object of its answer. Closing the generator ends the request."""
    where = f"{address.shown}{path}"
    try:
        with (
            httpx2.Client(**address.client(ANSWER_SECONDS)) as client,
            client.stream("POST", address.shown + path, json=body) as response,
        ):
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.read()
                yield _read(address, response, path).body
                return
            if response.status_code >= 300:
                response.read()
                raise _refusal(address, response, _server_words(address.redact(response.text)), path, "")
            yield from _read_events(response.iter_lines(), address, where)
    except (httpx2.HTTPError, OSError) as error:
        raise LorakitError(_describe_failure(address, error, ANSWER_SECONDS)) from error


def _read_events(lines: Iterator[str], address: Address, where: str) -> Iterator[dict[str, Any]]:
    """The events up to `[DONE]`; a LorakitError where one is an error or no JSON, or where the last one is missing."""
    ended = False
    for line in lines:
        name, _, value = line.partition(":")
        if name != "data":  # a comment, or another field of an event (the HTML standard, server-sent events)
            continue
        if value.strip() == "[DONE]":
            return
        try:
            event = json.loads(value)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or event.get("error"):
            words = _server_words(address.redact(value))
            raise LorakitError(f"{where}: the server breaks the answer off: {words}. Look at its log.")
        choices = event.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        ended = ended or (isinstance(first, dict) and bool(first.get("finish_reason")))
        yield event
    if not ended:
        raise LorakitError(f"{where}: the server's answer ends in the middle. Look at its log.")


async def _post(
    client: httpx2.AsyncClient,
    address: Address,
    path: str,
    body: Mapping[str, Any],
    place: str,
) -> ServerReply:
    for pause in (*_pauses(), None):
        try:
            response = await client.post(address.shown + path, json=body)
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            if pause is None:
                what = _describe_failure(address, error, ANSWER_SECONDS)
                raise LorakitError(f"{what} It was at {place}.") from error
        except (httpx2.HTTPError, OSError) as error:
            raise LorakitError(f"{_describe_failure(address, error, ANSWER_SECONDS)} It was at {place}.") from error
        else:
            if response.status_code not in _BUSY or pause is None:
                return _read(address, response, path, place)
            pause = _wanted_pause(response, pause)
        await asyncio.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _pauses() -> Iterator[float]:
    """Seconds between the tries."""
    yield from (_PAUSE * 2**number for number in range(_TRIES - 1))


def _wanted_pause(response: httpx2.Response, pause: float) -> float:
    """The seconds that a busy server asks for, if it does and they are not too many."""
    try:
        return min(max(float(response.headers.get("retry-after", "")), pause), _LONGEST_PAUSE)
    except ValueError:
        return pause


def _read(address: Address, response: httpx2.Response, path: str, place: str = "") -> ServerReply:
    """The JSON object of a response; an error with the server's own words where it is another thing."""
    at = f" It was at {place}." if place else ""
    status, text = response.status_code, address.redact(response.text)
    if status >= 300:
        raise _refusal(address, response, _server_words(text), path, at)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        kind = "an HTML page" if "<html" in text[:2000].lower() else "something that is not a JSON object"
        what = f"{address.shown}{path}: the server answers with {kind}: {_server_words(text) or 'nothing'}"
        remedy = "Is it the address of an OpenAI-compatible server, ending in /v1?"
        error = LorakitError if place else UserError
        raise error(f"{what}. {remedy}{at}")
    return ServerReply(body, response.headers.get("server"))


def _refusal(address: Address, response: httpx2.Response, words: str, path: str, at: str) -> LorakitError:
    """The error of a response that is none of success."""
    status = response.status_code
    what = f"{address.shown}{path}: the server answers {status}" + (f": {words}" if words else "")
    if status in (401, 403):
        given = "the key was not taken" if address.key or address.user else "it wants a key"
        return UserError(
            f"{what.rstrip('.')}. {given[0].upper()}{given[1:]}: set LORAKIT_API_KEY to one that it takes.{at}"
        )
    if status in (404, 405):
        remedy = "Check the address, which should end in /v1, and the name of the model."
        return UserError(f"{what.rstrip('.')}. {remedy}{at}")
    if status < 400:
        to = address.redact(str(response.headers.get("location", "")))
        return UserError(f"{what.rstrip('.')}, which leads to {one_line(to, 200) or 'nowhere'}. Give that address.{at}")
    if status in _BUSY:
        return LorakitError(f"{what.rstrip('.')}. Wait until it is ready, or look at its log.{at}")
    remedy = "Start it with a longer context, or leave the row out, if that is why."
    return UserError(f"{what.rstrip('.')}. {remedy if at else 'Look at its log.'}{at}")


def _server_words(text: str) -> str:
    """What a server says of an error, in a line: the message of the usual JSON object, else the text without tags."""
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        content = " ".join(_TAGS.sub(" ", text).split())
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(key):
            content = content[key]
    return one_line(content if isinstance(content, str) else json.dumps(content), 200)


def _describe_failure(address: Address, error: Exception, seconds: float) -> str:
    """A request that got no response, in a sentence with what to do."""
    where, words = address.shown, address.redact(_reason(error))
    secure = where.startswith("https:")
    if isinstance(error, httpx2.ConnectTimeout):
        remedy = "Check host and port, and whether a firewall is between."
        return f"{where}: no connection within {CONNECT_SECONDS:g} s. {remedy}"
    if isinstance(error, httpx2.TimeoutException):
        remedy = "Ask for shorter answers (--max-new-tokens), or give the server more to compute with."
        return f"{where}: no answer within {seconds:g} s. {remedy}"
    if any(isinstance(one, ssl.SSLError) for one in _chain(error)):
        remedy = (
            "Write http:// where the server speaks no TLS; SSL_CERT_FILE names a certificate authority of your own."
        )
        return f"{where}: no secure connection: {words}. {remedy}"
    if isinstance(error, httpx2.ProxyError):
        return f"{where}: the proxy fails: {words}. Look at HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
    if isinstance(error, httpx2.ConnectError):
        return f"{where}: no connection: {words}. Is the server running, and are host and port right?"
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.NetworkError):
        more = "" if secure else ", or wants https://"
        return f"{where}: the connection broke off: {words}. The server stopped{more}; look at its log."
    return f"{where}: the request failed: {words}. Check the address."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        yield one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def _reason(error: Exception) -> str:
    """The system's own words, which are in the last of the chain; asyncio writes others over them."""
    of_system = [one for one in _chain(error) if isinstance(one, OSError) and one.strerror]
    if not of_system:
        return one_line(first_line(error), 200).rstrip(".")
    number = of_system[-1].errno or 0
    by_asyncio = number > 0 and not isinstance(of_system[-1], ssl.SSLError)
    return one_line(os.strerror(number) if by_asyncio else str(of_system[-1].strerror), 200).rstrip(".")
