"""A hub of a few addresses on this machine, as far as huggingface_hub asks for an upload.

What it answers is that of the real one's API, as huggingface_hub 2 calls it (hf_api.py,
_commit_api.py): who am I, create a repository, list its files, commit.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token_of_this_test"


@dataclass
class Hub:
    """What the hub holds, and how it behaves.

    Attributes:
        repos: Files by repository.
        private: Whether each repository was made as a private one.
        gated: Whether repositories are gated for the token.
        refuses_commits: Whether the token may write nothing.
        asked: Method and path of every request.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    gated: bool = False
    refuses_commits: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""
    server: ThreadingHTTPServer | None = None

    def stop(self) -> None:
        """Close the port, as if the network was gone."""
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()
        self.server = None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers."""
        place = path.partition("?")[0]
        if place == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}, {}
        if self.gated:
            return 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"}
        if place == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}, {}
            self.repos[repo] = {".gitattributes": b""}
            self.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{repo}"}, {}
        if place == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        repo = "/".join(place.split("/")[3:5])
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if "/tree/" in place:
            files = self.repos[repo].items()
            return 200, [_entry(name, data) for name, data in files], {}
        if "/preupload/" in place:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": files}, {}
        if "/commit/" in place:
            if self.refuses_commits:
                return 403, {"error": "Forbidden"}, {}
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.url}/{repo}/commit/0"
            return 200, {"commitUrl": url, "commitOid": "0", "success": True}, {}
        return 200, {"id": repo, "sha": "0", "siblings": []}, {}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": "0"}


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            # A connection that is still open from before answers nothing either.
            if hub.server is None:
                self.close_connection = True
                return
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            hub.asked.append(f"{self.command} {self.path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                error = "Invalid credentials in Authorization header"
                status, value, headers = 401, {"error": error}, {"X-Error-Message": error}
            else:
                status, value, headers = hub.answer(self.command, self.path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = do_PUT = _serve

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    hub.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{hub.server.server_address[1]}"
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.server is not None:
            hub.stop()
        thread.join()
