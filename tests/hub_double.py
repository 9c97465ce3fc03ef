"""A double of the hub's HTTP API on 127.0.0.1, as far as pushing and looking at a model need it: real huggingface_hub
talks to it. It keeps the files of each repository, and what was asked of it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "Valid" * 7


class HubDouble:
    """`repositories`: name -> {private, files, tags}; `requests`: method and path of each, in order."""

    def __init__(self):
        self.repositories, self.requests, self.commits, self.blobs = {}, [], [], {}
        self.may_write = {"me"}
        self.fails: dict[str, int] = {}  # a part of a path -> the status that it is answered with
        hub = self

        class Handler(_Handler):
            double = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, private=True, **files):
        tags = ["lorakit"] if "lorakit" in files.get("README.md", "") else []
        content = {key: value.encode() for key, value in files.items()}
        self.repositories[name] = {"private": private, "files": {".gitattributes": b"", **content}, "tags": tags}


class _Handler(BaseHTTPRequestHandler):
    double: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status=200, body=None, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self):
        """The body, or None where the request has been answered: by a failure that was asked for, or to a stranger."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.double.requests.append(f"{self.command} {self.path}")
        for part, status in self.double.fails.items():
            if part in self.path:
                self._answer(status, {"error": "the reason of the hub"})
                return None
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/blob/" not in self.path:
            self._answer(401, {}, X_Error_Message="Invalid credentials in Authorization header")
            return None
        return body

    def do_GET(self):
        if self._begin() is None:
            return None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)", self.path.partition("?")[0]):
            repository = self.double.repositories.get(found[1])
            if repository is None:
                return self._answer(404, {}, X_Error_Code="RepoNotFound")
            files = [{"rfilename": name} for name in repository["files"]]
            facts = {"id": found[1], "sha": "a" * 40, "private": repository["private"], "tags": repository["tags"]}
            return self._answer(200, {**facts, "siblings": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            content = self.double.repositories[found[1]]["files"][found[2]]
            return self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="a" * 40)
        return self._answer(404, {}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_PUT(self):
        body = self._begin()
        if body is not None:
            self.double.blobs[self.path.rpartition("/")[2]] = body
            self._answer(200, {})

    def do_POST(self):
        body = self._begin()
        if body is None:
            return None
        double, path = self.double, self.path.partition("?")[0]
        if path == "/api/repos/create":
            facts = json.loads(body)
            name = f"{facts['organization']}/{facts['name']}"
            if facts["organization"] not in double.may_write:
                return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            double.repositories[name] = {
                "private": facts["visibility"] == "private", "files": {".gitattributes": b""}, "tags": []
            }  # fmt: skip
            return self._answer(200, {"url": f"{double.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            modes = [
                {"path": one["path"], "uploadMode": mode[one["path"].endswith(".safetensors")], "shouldIgnore": False}
                for one in files
            ]
            return self._answer(200, {"files": modes})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{double.url}/blob/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"objects": objects, "transfer": "basic"})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
            facts = {"commitUrl": f"{double.url}/{found[1]}/commit/{'b' * 40}", "commitOid": "b" * 40}
            return self._answer(200, {**facts, "pullRequestUrl": None})
        return self._answer(404, {})

    def _commit(self, name, lines):
        repository = self.double.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.double.commits.append(value["summary"])
            elif line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.double.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
        card = repository["files"].get("README.md", b"").decode()
        repository["tags"] = ["lorakit"] if "- lorakit\n" in card else []
