"""The Hugging Face hub on this machine: the real client talks to it over HTTP, and keeps its own cache.

What it answers is what the client of today asks for: a repository's listing, files by revision, and
the way of a commit: repository, branch, preupload, large files, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"
API = "/api/models/"
REGULAR = (".md", ".json")  # what goes into a commit's body; all else goes the way of large files


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits as whole trees, oldest first; branches by name."""

    private: bool = False
    gated: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        tree = {**self.trees.get(self.branches.get(branch, ""), {}), **files}
        told = json.dumps([message, len(self.trees), {name: git_oid(data) for name, data in tree.items()}])
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.trees[commit], self.branches[branch] = tree, commit
        return commit

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.trees else None)


class Hub:
    """What the server knows; `asked` is every request, `broken` a status that it answers everything with."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.broken = 0
        self.url = ""

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        return self.repos.setdefault(name, Repo()).commit(files, branch)

    def newest(self, name: str) -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.trees[repo.branches["main"]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {self.path_only}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.broken:
            return self._send(self.hub.broken, {"error": "out of order"})
        writes = self.command in ("POST", "PUT")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if writes and not known and not self.path_only.startswith("/large/"):
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.path_only}"):
                return method(self, *found.groups())
        self._send(404, {"error": f"nothing answers {self.command} {self.path_only}"})

    def _send(self, status: int, told: object = b"", **headers: str) -> None:
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _tree(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and its commit; None once the refusal was sent."""
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or repo.private and not known:
            return self._refuse(404 if known else 401, "RepoNotFound")
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        commit = repo.find(revision)
        return (repo, commit) if commit else self._refuse(404, "RevisionNotFound")

    def info(self, name: str, revision: str | None) -> None:
        if found := self._tree(name, revision or "main"):
            repo, commit = found
            files = [
                {"rfilename": path, "size": len(data), "blobId": git_oid(data)}
                | ({} if path.endswith(REGULAR) else {"lfs": _large(data)})
                for path, data in repo.trees[commit].items()
            ]
            self._send(200, {"id": name, "sha": commit, "private": repo.private, "siblings": files})

    def file(self, name: str, revision: str, path: str) -> None:
        if found := self._tree(name, revision):
            repo, commit = found
            data = repo.trees[commit].get(path)
            if data is None:
                return self._send(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            self._send(200, data, ETag=f'"{git_oid(data)}"', X_Repo_Commit=commit)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", "url": self._url(name)})
        self.hub.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self.hub.repos[name].commit({}, message="initial commit")
        self._send(200, {"url": self._url(name), "name": name})

    def _url(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def branch(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        if branch in repo.branches:
            return self._send(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        self._send(200, {})

    def yaml(self) -> None:
        import yaml

        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        sound = found and isinstance(yaml.safe_load(found[1]), dict)
        told = {"errors": [] if sound else [{"message": "no metadata"}], "warnings": []}
        self._send(200 if sound else 400, told)

    def preupload(self, name: str, revision: str) -> None:
        if not (found := self._tree(name, revision)):
            return
        files = [
            {"path": one["path"], "shouldIgnore": False,
             "uploadMode": "regular" if one["path"].endswith(REGULAR) else "lfs"}
            for one in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._send(200, {"files": files, "commitOid": found[1]})

    def batch(self, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.hub.messages.append(message)
        commit = self.hub.repos[name].commit(files, revision, message)
        self._send(200, {"commitUrl": f"{self._url(name)}/commit/{commit}", "commitOid": commit})


def _large(data: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


ROUTES = (
    (rf"GET {API}([^/]+/[^/]+)(?:/revision/(.+))?", _Handler.info),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.file),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST {API}([^/]+/[^/]+)/branch/(.+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.yaml),
    (rf"POST {API}([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/([0-9a-f]+)", _Handler.upload),
    (rf"POST {API}([^/]+/[^/]+)/commit/(.+)", _Handler.commit),
)


@pytest.fixture
def the_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that can be reached, an empty cache of its client, and no token."""
    from huggingface_hub import constants

    hub, own = Hub(), tmp_path_factory.mktemp("client")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(own / "hub"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,  # as the program has it
        "HF_TOKEN_PATH": str(own / "token"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
