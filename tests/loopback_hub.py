"""A Hugging Face hub on 127.0.0.1, in memory: as much of it as huggingface_hub 2.4 and datasets 5.2 ask for.

    with LoopbackHub(token="hf_test") as hub:
        sha = hub.add_dataset("owner/name", {"README.md": b"..."})
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})

Repositories have commits with whole trees of files; `main` names the newest. Files of 1 kB or more, and parquet
files, travel by LFS as on the hub. Anonymous requests see public repositories only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"^/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info|preupload|commit)/(?P<rev>[^/]+)(/(?P<path>.*))?)?$"
)
_RESOLVE = re.compile(r"^/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")
_BATCH = re.compile(r"^/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")
_RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]
    touched: list[str] = field(default_factory=list)  # names that the commit spoke of


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def add(self, message: str, files: dict[str, bytes]) -> Commit:
        content = [[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), message, content]).encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.sha == revision), None)


class LoopbackHub:
    """Starts with `with`, stops at its end. `requests` lists what was asked for: (method, path)."""

    def __init__(self, token: str | None = "hf_loopback") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        # Bytes of the bodies that came in, contents of large files ("lfs") and all else.
        self.received: Counter[str] = Counter()
        # Set to make commits or uploads fail: (status, message).
        self.refuse_commit: tuple[int, str] | None = None
        self.refuse_upload: tuple[int, str] | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that shall take this for the hub; its caches go into `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **({"HF_TOKEN": self.token} if self.token else {}),
        }

    def add_dataset(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Add a commit that holds exactly these files; returns its sha."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        return repository.add("added by a test", dict(files)).sha


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # --- plumbing

    def _answer(self) -> None:
        self._url = urlsplit(self.path)
        self._query = parse_qs(self._url.query)
        self._body = self._read_body()
        path = unquote(self._url.path)
        self.hub.requests.append((self.command, path))
        self.hub.received["lfs" if path.startswith("/lfs/") else "other"] += len(self._body)
        if path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self._validate_yaml()
        elif path == "/api/whoami-v2":
            self._json({"name": "tester", "type": "user", "orgs": []})
        elif match := _BATCH.match(path):
            self._lfs_batch()
        elif path.startswith("/lfs/"):
            self._lfs_object(path.removeprefix("/lfs/"))
        elif match := _RESOLVE.match(path):
            self._resolve(match["repo"], match["rev"], match["path"])
        elif match := _API.match(path):
            self._api(match["repo"], match["what"] or "revision", match["rev"] or "main", match["path"] or "")
        else:
            self._error(404, "no such page")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json", **headers})

    def _error(self, status: int, message: str, code: str = "") -> None:
        extra = {"X-Error-Code": code} if code else {}
        self._json({"error": message}, status, **{"X-Error-Message": message, **extra})

    def _knows_token(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _find(self, repo: str, revision: str) -> tuple[Repository, Commit] | None:
        """The repository at a revision, or None after an error was sent."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self._knows_token()):
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        commit = repository.at(revision)
        if commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repository, commit

    # --- pages

    def _create(self) -> None:
        if not self._knows_token():
            return self._error(401, "Invalid username or password.")
        values = json.loads(self._body)
        repo = f"{values['organization'] or 'tester'}/{values['name']}"
        url = f"{self.hub.url}/datasets/{repo}"
        if repo in self.hub.repositories:
            return self._json({"error": "You already created this dataset repo", "url": url}, 409)
        private = values.get("visibility") == "private" or bool(values.get("private"))
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].add("initial commit", {".gitattributes": b"*.parquet filter=lfs -text\n"})
        return self._json({"url": url, "name": repo})

    def _validate_yaml(self) -> None:
        import yaml

        content = json.loads(self._body)["content"]
        try:
            assert content.startswith("---\n")
            assert isinstance(yaml.safe_load(content.split("\n---\n")[0]), dict)
        except (AssertionError, yaml.YAMLError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _lfs_batch(self) -> None:
        if not self._knows_token():
            return self._error(401, "Invalid username or password.")
        objects = []
        for item in json.loads(self._body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str) -> None:
        if self.hub.refuse_upload is not None:
            return self._error(*self.hub.refuse_upload)
        if hashlib.sha256(self._body).hexdigest() != oid:
            return self._error(400, "the content does not have this sha256")
        self.hub.objects[oid] = self._body
        return self._send(200, b"", {})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return None
        commit = found[1]
        if path not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        headers = {
            "ETag": f'"{_etag(path, data)}"',
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match := _RANGE.match(self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if start > end:
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers)
        return self._send(200, data, headers)

    def _api(self, repo: str, what: str, revision: str, path: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return None
        repository, commit = found
        if what == "revision":
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            return self._json(
                {"id": repo, "sha": commit.sha, "private": repository.private, "siblings": siblings, "tags": []}
            )
        if what == "tree":
            return self._tree(commit, path)
        if what == "paths-info":
            form = parse_qs(self._body.decode())
            names = form.get("paths") or json.loads(self._body or b"{}").get("paths", [])
            return self._json(_entries(commit, [name.strip("/") for name in names]))
        if not self._knows_token():
            return self._error(401, "Invalid username or password.")
        if what == "preupload":
            return self._preupload()
        return self._commit(repo, repository, commit)

    def _tree(self, commit: Commit, path: str) -> None:
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        below = [name for name in commit.files if name.startswith(prefix)]
        if prefix and not below:
            return self._error(404, "Entry not found", "EntryNotFound")
        folders = {
            name[: len(prefix) + i]
            for name in below
            for i, character in enumerate(name[len(prefix) :])
            if character == "/"
        }
        if self._query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = [name for name in below if "/" not in name[len(prefix) :]]
            folders = {name for name in folders if "/" not in name[len(prefix) :]}
        return self._json(_entries(commit, sorted(folders) + sorted(below)))

    def _preupload(self) -> None:
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if _by_lfs(item["path"], item["size"]) else "regular",
                "shouldIgnore": False,
            }
            for item in json.loads(self._body)["files"]
        ]
        return self._json({"files": files})

    def _commit(self, repo: str, repository: Repository, parent: Commit) -> None:
        if self.hub.refuse_commit is not None:
            return self._error(*self.hub.refuse_commit)
        lines = [json.loads(line) for line in self._body.splitlines() if line.strip()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent.sha):
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(f"{value['path']}/")}
        commit = repository.add(header["summary"], files)
        commit.touched = sorted(line["value"]["path"] for line in lines[1:])
        url = f"{self.hub.url}/datasets/{repo}/commit/{commit.sha}"
        return self._json({"commitUrl": url, "commitOid": commit.sha, "pullRequestUrl": None, "success": True})


def _entries(commit: Commit, names: list[str]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in names:
        if name in commit.files:
            data = commit.files[name]
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_blob(data)}
            if _by_lfs(name, len(data)):
                entry["oid"] = _git_blob(b"version https://git-lfs.github.com/spec/v1\noid sha256:...\n")
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        elif any(other.startswith(f"{name}/") for other in commit.files):
            entries.append(
                {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
            )
    return entries


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _by_lfs(name, len(data)) else _git_blob(data)


def _by_lfs(name: str, size: int) -> bool:
    return name.endswith(".parquet") or size >= 1000


def _git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
