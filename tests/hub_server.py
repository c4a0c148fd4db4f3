"""A local stand-in of the Hugging Face hub's HTTP interface, as huggingface_hub speaks it: set HF_ENDPOINT to it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_0f1e2d3c4b5a69788796a5b4c3d2e1f0"


class HubServer:
    """`repos`: {you/name: {file: bytes}}; `visibility`: what was asked for; `requests`: (method, path) of all calls.

    Writing needs TOKEN, reading a private repository too. `down`: True: every call gets the status 503.
    """

    def __init__(self):
        self.repos, self.visibility, self.blobs, self.requests, self.down = {}, {}, {}, [], False

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        return self

    def __exit__(self, *exc):
        self._http.shutdown()
        self._http.server_close()

    def revision(self, repo):
        """Return the id of the repository's last commit, which follows from its content."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.requests.append((self.command, path))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if hub.down:
            return self._send(503, {})
        if self.command in ("GET", "HEAD"):
            return self._read(path, allowed)
        if path.startswith("/upload/"):  # a signed address
            hub.blobs[path.rsplit("/", 1)[1]] = body
            return self._send(200, {})
        if not allowed:
            return self._send(401, {"error": "Invalid username or password."})
        return self._write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _write(self, path, body):
        hub = self.hub
        asked = json.loads(body) if "/commit/" not in path else [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in hub.repos
            hub.repos.setdefault(repo, {})
            hub.visibility.setdefault(repo, asked.get("visibility", "public"))
            return self._send(409 if known else 200, {"url": f"{hub.address}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            big = lambda name: "lfs" if name.endswith((".safetensors", ".onnx")) else "regular"  # noqa: E731
            names = [file["path"] for file in asked["files"]]
            return self._send(200, {"files": [{"path": n, "uploadMode": big(n), "shouldIgnore": False} for n in names]})
        if path.endswith("/info/lfs/objects/batch"):
            made = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}}}
                for each in asked["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": made})
        repo = "/".join(path.split("/")[3:5])  # /api/models/you/name/commit/main
        for line in asked:
            value = line["value"]
            if line["key"] == "file":
                hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                hub.repos[repo][value["path"]] = content
            elif line["key"] == "deletedFile":
                del hub.repos[repo][value["path"]]
        revision = hub.revision(repo)
        url = f"{hub.address}/{repo}/commit/{revision}"
        return self._send(200, {"success": True, "commitOid": revision, "commitUrl": url, "hookOutput": ""})

    def _read(self, path, allowed):
        hub, parts = self.hub, path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in hub.repos or (hub.visibility.get(repo) == "private" and not allowed):
            return self._send(404 if allowed else 401, {}, {"X-Error-Code": "RepoNotFound"})
        revision = {"X-Repo-Commit": hub.revision(repo)}
        if parts[0] == "api":
            files = [{"rfilename": name} for name in hub.repos[repo]]
            return self._send(200, {"id": repo, "sha": hub.revision(repo), "siblings": files, "private": False})
        name = "/".join(parts[4:])  # /you/name/resolve/<revision>/<file>
        if name not in hub.repos[repo]:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound"} | revision)
        content = hub.repos[repo][name]
        return self._send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'} | revision)

    def _send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
