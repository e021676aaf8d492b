"""A hub on this machine: as much of its protocol as huggingface_hub needs to push and to fetch, without xet.

A repository has one revision, the last one. What is asked for is told by the path alone: the routes stand in `Hub`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest

TOKEN = "hf_NobodyMayKeepThisToken"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits


@dataclass
class Hub:
    """What it holds, and how it fails: `fault` gives the status that it answers to a path with; 0 hangs up."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/owner/name"
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    fault: Callable[[str], int | None] = lambda path: None

    def create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked['organization'] or 'me'}/{asked['name']}"
        self.repositories.setdefault(f"{kind}/{name}", Repository(asked.get("visibility") == "private"))
        return {"url": f"{self.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"}

    def preupload(self, body: bytes, name: str) -> dict[str, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        large = (".safetensors", ".parquet")
        mode = {path: "lfs" if path.endswith(large) else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": mode[path], "shouldIgnore": False} for path in paths]}

    def batch(self, body: bytes) -> dict[str, Any]:
        def place(one: dict[str, Any]) -> dict[str, Any]:
            return one | {"actions": {"upload": {"href": f"{self.endpoint}/large/{one['oid']}"}}}

        return {"objects": [place(one) for one in json.loads(body)["objects"]]}

    def upload(self, body: bytes, oid: str) -> dict[str, Any]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return {}

    def commit(self, body: bytes, name: str) -> dict[str, Any]:
        repository = self.repositories[name]
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "header":
                repository.messages.append(value["summary"])
            elif operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "lfsFile"
                repository.files[value["path"]] = self.large[value["oid"]]
        plain = name.removeprefix("models/")
        return {"commitOid": self.sha(name), "commitUrl": f"{self.endpoint}/{plain}/commit/{self.sha(name)}"}

    def sha(self, name: str) -> str:
        return hashlib.sha1(repr(self.repositories[name].messages).encode()).hexdigest()

    def info(self, body: bytes, name: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.repositories[name].files]
        return {"id": name.partition("/")[2], "sha": self.sha(name), "siblings": siblings, "tags": []}

    def tree(self, body: bytes, name: str) -> list[dict[str, Any]]:
        return [self._file(path, content) for path, content in self.repositories[name].files.items()]

    def paths_info(self, body: bytes, name: str) -> list[dict[str, Any]]:
        files = self.repositories[name].files
        return [self._file(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files]

    @staticmethod
    def _file(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def file(self, name: str, path: str) -> bytes | None:
        return self.repositories[name].files.get(path)

    ROUTES = (  # of JSON answers
        (r"POST /api/repos/create", create),
        (r"POST /api/(.+)/preupload/main", preupload),
        (r"POST /.+\.git/info/lfs/objects/batch", batch),
        (r"PUT /large/(\w+)", upload),
        (r"POST /api/(.+)/commit/main", commit),
        (r"GET /api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/\w+)?", info),
        (r"GET /api/(.+)/tree/\w+", tree),
        (r"POST /api/(.+)/paths-info/\w+", paths_info),
        (r"POST /api/validate-yaml", lambda self, body: {}),
    )


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status = hub.fault(path)
            if status == 0:
                self.close_connection = True
                return
            # Large files go to an address that is signed; everything else needs to say who asks.
            if status is None and not path.startswith("/large/") and TOKEN not in self.headers.get("Authorization", ""):
                status = 401
            if status is not None:
                self.answer(status, b'{"error": "No."}')
                return
            if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
                name = f"{found[1] or 'models/'}{found[2]}"
                content = hub.file(name, found[3])
                if content is None:
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=hub.sha(name))
                else:
                    self.answer(200, content, ETag=hashlib.sha1(content).hexdigest(), X_Repo_Commit=hub.sha(name))
                return
            for pattern, act in Hub.ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    self.answer(200, json.dumps(act(hub, body, *found.groups())).encode())
                    return
            # A folder that is not there, or something that this hub does not know.
            self.answer(404, f"{self.command} {path}".encode(), X_Error_Code="EntryNotFound")

        do_GET = do_HEAD = do_POST = do_PUT = serve

    return Handler


@contextmanager
def serving(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """A hub that everything in this process takes for the real one, and a token for it."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        constants = {
            "ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": cache,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in constants.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        patch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", f"{cache}/datasets")
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
        patch.setenv("HF_TOKEN", TOKEN)
        try:
            yield hub
        finally:
            server.shutdown()
