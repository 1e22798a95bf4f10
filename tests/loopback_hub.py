"""A model hub on 127.0.0.1 that answers what the real huggingface_hub client asks, and misbehaves on demand.

    with LoopbackHub() as hub:
        commit = hub.commit("owner/name", {"model.safetensors": b"...", "config.json": b"{}"})
        hub.faults["model.safetensors"] = Fault("cut", after=1000, times=1)

Small text files come straight from the repository, everything else from "another host" (the same server under the
name localhost), as on the real hub: a HEAD of the file redirects there and names the sha256 in its headers.
"""

import hashlib
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".py")  # kept in git, not in LFS


@dataclass
class Fault:
    """What goes wrong with a file, for the next `times` requests of its bytes.

    Attributes:
        kind: "cut" (connection closed), "stall" (nothing more comes), "corrupt" (one byte flipped), "short" (too few
            bytes, politely), "missing" (404), "error" (500), "slow" (a pause after every `after` bytes).
        after: Bytes sent before it happens.
        seconds: Length of each pause of "slow".
    """

    kind: str
    after: int = 0
    times: int = 1_000_000
    seconds: float = 0.05


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    host: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class LoopbackHub:
    """The server; `commits[repo][commit][file]` is what it holds, `branches[repo]` the commit that "main" means."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)  # repo -> 401 or 403
    token: str | None = None  # that opens the refused ones
    xet: dict[str, tuple[str, str]] = field(default_factory=dict)  # file -> (xet hash, address of the xet storage)
    down: int | None = None  # every answer is this status
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> "LoopbackHub":
        self.closing = threading.Event()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit and make it the head of main."""
        content = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo}{content}".encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches[repo] = commit
        return commit

    def ranges(self, name: str) -> list[str | None]:
        """Return the Range header of every request for a file's bytes."""
        return [asked.range for asked in self.asked if asked.method == "GET" and asked.path.endswith("/" + name)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, address) -> None:
        """A client that was ended in the middle is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.asked.append(
            Asked(self.command, headers["Host"], path, headers.get("Range"), headers.get("Authorization"))
        )
        parts = path.strip("/").split("/")
        with suppress(BrokenPipeError, ConnectionResetError):
            if self.hub.down:
                self._send(self.hub.down, {}, b"down")
            elif parts[:2] == ["api", "models"]:
                self._send_listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif parts[0] == "xet-token":
                storage, expires = self.hub.xet[parts[1]][1], 9_999_999_999
                headers = {"X-Xet-Cas-Url": storage, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expires)}
                self._send(200, headers, json.dumps({"casUrl": storage, "accessToken": "t", "exp": expires}).encode())
            elif parts[0] == "elsewhere":
                self._send_bytes(*parts[1:3], "/".join(parts[3:]))
            elif len(parts) > 4 and parts[2] == "resolve":
                self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._send(404, {}, b"")

    def _send(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _is_open(self, repo: str) -> bool:
        """Refuse as the real hub does: a 401 also stands for a repository that does not exist."""
        status = self.hub.refused.get(repo)
        if repo not in self.hub.commits:
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"")
        elif status is None or (self.hub.token and self.headers.get("Authorization") == f"Bearer {self.hub.token}"):
            return True
        elif status == 403:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access"}, b"")
        else:
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"")
        return False

    def _send_listing(self, repo: str, revision: str) -> None:
        if not self._is_open(repo):
            return
        commit = self.hub.branches[repo] if revision == "main" else revision
        if commit not in self.hub.commits[repo]:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"")
            return
        siblings = [_sibling(name, data) for name, data in self.hub.commits[repo][commit].items()]
        listing = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        if not self._is_open(repo):
            return
        data = self.hub.commits[repo].get(revision, {}).get(name)
        fault = self.hub.faults.get(name)
        if data is None or (fault and fault.kind == "missing"):
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision}, b"")
        elif name.endswith(TEXT_SUFFIXES):
            self._send_data(name, data, {"X-Repo-Commit": revision, "ETag": f'"{_git_sha1(data)}"'})
        else:
            location = f"http://localhost:{self.hub.port}/elsewhere/{repo}/{name}?signed=1&commit={revision}"
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": revision}
            if name in self.hub.xet:
                refresh = f"{self.hub.endpoint}/xet-token/{name}/read"
                linked |= {"X-Xet-Hash": self.hub.xet[name][0], "X-Xet-Refresh-Route": refresh}
            self._send(302, {"Location": location, **linked}, b"")

    def _send_bytes(self, owner: str, repo: str, name: str) -> None:
        commit = self.path.rpartition("=")[2]
        self._send_data(name, self.hub.commits[f"{owner}/{repo}"][commit][name], {"ETag": '"not-the-sha256"'})

    def _send_data(self, name: str, data: bytes, headers: dict) -> None:
        fault = self.hub.faults.get(name) if self.command == "GET" else None
        if fault:
            fault.times -= 1
            if fault.times <= 0:
                del self.hub.faults[name]
        kind = fault.kind if fault else None
        if kind == "error":
            self._send(500, {}, b"")
            return
        if kind == "corrupt":
            data = data[: fault.after] + bytes([data[fault.after] ^ 1]) + data[fault.after + 1 :]
        if kind == "short":
            data = data[: fault.after]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if "Range" in self.headers else {}
        self.send_response(206 if ranged else 200)
        for key, value in {"Content-Length": str(len(data) - start), **headers, **ranged}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._write(data[start:], fault)

    def _write(self, data: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if kind in ("cut", "stall"):
            self.wfile.write(data[: fault.after])
            self.wfile.flush()
            if kind == "stall":
                self.hub.closing.wait()
            self.close_connection = True
        elif kind == "slow":
            for at in range(0, len(data), fault.after):
                self.wfile.write(data[at : at + fault.after])
                time.sleep(fault.seconds)
        else:
            self.wfile.write(data)


def _sibling(name: str, data: bytes) -> dict:
    sibling = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
    if not name.endswith(TEXT_SUFFIXES):
        sha256 = hashlib.sha256(data).hexdigest()
        sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return sibling


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
