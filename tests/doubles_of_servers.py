"""Servers of the tests: a real one, which serves a GGUF file, and doubles of servers that are broken."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

SERVE = Path(__file__).with_name("serve_gguf.py")


@contextmanager
def served(gguf: Path, template: Path | None = None) -> Iterator[str]:
    """The address of an OpenAI-compatible server of llama.cpp that serves the file, with a chat template if given."""
    command = [sys.executable, str(SERVE), str(gguf), *([str(template)] if template else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip() + "/v1"
        finally:
            process.kill()


class DoubleServer:
    """What a double was asked, and the address of it."""

    def __init__(self, url: str) -> None:
        self.url, self.requests, self.headers = url, list[dict](), list[dict]()


Answer = Callable[[dict, int], tuple[int, object]]
"""From the body of a chat request and its number, counted from 1: status, and an object for JSON, text, or None to
break the connection off."""


@contextmanager
def double(answer: Answer | None = None, models: object = ("tiny",), **headers: str) -> Iterator[DoubleServer]:
    """A server that lists models, or answers to that with a (status, body), and answers chat requests by `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            known.headers.append(dict(self.headers))
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
            self.reply(*(models if models and isinstance(models[0], int) else (200, listed)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known.requests.append(body)
            known.headers.append(dict(self.headers))
            self.reply(*(answer or echo)(body, len(known.requests)))

        def reply(self, status: int, body: object) -> None:
            if body is None:
                self.close_connection = True
                self.connection.close()
                return
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    known = DoubleServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def echo(body: dict, number: int) -> tuple[int, object]:
    return 200, reply_with("yes")


def reply_with(text: str, prompt_tokens: int | None = None, finish: str = "stop") -> dict:
    usage = {} if prompt_tokens is None else {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"object": "chat.completion", "choices": [choice], "system_fingerprint": "fp_1"} | usage
