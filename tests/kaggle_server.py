"""A local server for the `kaggle` client 2.2, which can break off, refuse and hang as Kaggle does.

    with KaggleServer() as server:
        server.competitions["a-slug"] = zip_bytes
        subprocess.run(["kaggle", "competitions", "download", "a-slug"], env=os.environ | server.environment(home))

KAGGLE_API_ENVIRONMENT=LOCALHOST and http_proxy lead the client here, and so do its storage addresses.
"""

import base64
import datetime
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

STORAGE = "http://storage.kaggle.test"
SIGNATURE = "X-Goog-Signature=5167a7e5"  # a signed address opens a file to anybody: it must not be shown either
USER, KEY, TOKEN = "chest", "0f1e2d3c4b5a69788796a5b4c3d2e1f0", "KGAT_9d8c7b6a5f4e3d2c1b0a"
PUBLIC = ("DownloadDataset", "IntrospectToken")  # need no account


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status, message, headers=()):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers)


class KaggleServer:
    """State and behaviour; every attribute may be changed while it runs.

    competitions and datasets map a slug to the bytes of its zip; rules: competitions whose rules are not accepted;
    submissions, kernels and created are what the client made; requests lists (method, address without its query,
    headers) of all that was asked. refuse(name, …) and hang(name) rule the next calls of a function; cuts: byte counts
    after which the next file transfers break off; stalls: after which they hang.
    """

    def __init__(self):
        self.competitions, self.datasets, self.kernels, self.created = {}, {}, {}, {}
        self.rules, self.submissions, self.blobs, self.requests = set(), [], {}, []
        self.cuts, self.stalls, self.score, self.polls, self.left = [], [], lambda content: "0.8421", 1, 5
        self.on_hang = lambda: None  # called when it hangs
        self.archive = "archive.zip"  # the name at the end of a download's address
        self.hidden = False  # True: submissions are taken but not yet listed
        self._planned, self._closing = {}, threading.Event()

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"kaggle": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        return self

    def __exit__(self, *exc):
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home, credentials="kaggle.json"):
        """Return variables that lead the client here; credentials in `home`: kaggle.json, access_token or None."""
        folder = Path(home) / ".kaggle"
        folder.mkdir(parents=True, exist_ok=True)
        if credentials is not None:
            text = {"kaggle.json": json.dumps({"username": USER, "key": KEY}), "access_token": TOKEN}[credentials]
            (folder / credentials).write_text(text)
            (folder / credentials).chmod(0o600)
        proxies = {"http_proxy": self.address, "HTTP_PROXY": self.address, "no_proxy": "", "NO_PROXY": ""}
        folders = {"HOME": str(home), "TMPDIR": str(home), "KAGGLE_CONFIG_DIR": str(folder)}
        return proxies | folders | {"KAGGLE_API_ENVIRONMENT": "LOCALHOST"}

    def refuse(self, name, status, message="", times=1, headers=()):
        """Answer the next `times` calls of the API's function `name` (or of PUT, a transfer) with this status."""
        self._planned.setdefault(name, []).extend([Refusal(status, message, headers)] * times)

    def hang(self, name):
        """Never answer the next call of `name`."""
        self._planned.setdefault(name, []).append(None)

    def lose(self, name):
        """Carry out the next call of `name`, but lose its answer."""
        self._planned.setdefault(name, []).append("lose")

    def asked(self, name):
        """Return the headers of the calls of one function, or of the transfers of one method (PUT, GET)."""
        return [headers for method, address, headers in self.requests if method == name or address.endswith("/" + name)]

    def wait(self):
        """Call `on_hang`, then hang until the server ends."""
        self.on_hang()
        self._closing.wait(60)

    def plan(self, name):
        """Return `answer` or `lose` for the next call of `name`, or raise its Refusal."""
        steps = self._planned.get(name, [])
        step = steps.pop(0) if steps else "answer"
        if step is None:
            self.wait()
            return "lose"
        if isinstance(step, Refusal):
            raise step
        return step

    # ---- the functions of the API: a dict for a dict, or (status, address) to lead elsewhere --------------------

    def IntrospectToken(self, asked):
        return {"active": asked["token"] == TOKEN, "username": USER}

    def DownloadDataFiles(self, asked):
        slug = asked["competitionName"]
        self._competition(slug)
        return f"{STORAGE}/competitions/{slug}/{self.archive}?{SIGNATURE}"

    def StartSubmissionUpload(self, asked):
        self._competition(asked["competitionName"])
        return self._blob(asked["fileName"])

    def CreateSubmission(self, asked):
        self._competition(asked["competitionName"])
        if asked["blobFileTokens"] not in self.blobs:
            raise Refusal(400, "Blob not found")
        if self.left < 1:
            text = "Your team has used its daily Submission allowance (5) today, please try again tomorrow UTC"
            raise Refusal(400, f"Submission not allowed:  {text} (5.2 hours from now).")
        self.left -= 1
        now = datetime.datetime.now(datetime.UTC).isoformat()[:23] + "Z"
        about = {"ref": 1000 + len(self.submissions), "date": now, "fileName": "submission.csv", "status": "PENDING"}
        about |= {"description": asked.get("submissionDescription", "")}
        self.submissions.insert(0, {"polls": self.polls, "content": self.blobs[asked["blobFileTokens"]]} | about)
        return {"message": f"Successfully submitted to {asked['competitionName'].title()}", "ref": about["ref"]}

    def GetSubmissionLimits(self, asked):
        return {"numToday": 5 - self.left, "numAllowedNow": self.left}

    def ListSubmissions(self, asked):
        self._competition(asked["competitionName"])
        shown = []
        for submission in [] if self.hidden else self.submissions:
            if submission["status"] == "PENDING":
                submission["polls"] -= 1
                if submission["polls"] < 0:
                    public = self.score(submission["content"])
                    scored = {"status": "COMPLETE", "publicScore": public, "privateScore": "0.8100"}
                    submission |= scored if public else {"status": "ERROR", "errorDescription": "no such image"}
            shown.append({name: value for name, value in submission.items() if name not in ("polls", "content")})
        return {"submissions": shown}

    def DownloadDataset(self, asked):
        return f"{STORAGE}/datasets/{self._dataset(asked)}/archive.zip?{SIGNATURE}"

    def StartBlobUpload(self, asked):
        return self._blob(asked["name"])

    def GetDatasetStatus(self, asked):
        self._dataset(asked)
        return {"status": "READY"}

    def CreateDataset(self, asked, version=1):
        name = f"{asked['ownerSlug']}/{asked['slug']}"
        files = {token.split("/", 1)[1]: self.blobs[token] for token in (file["token"] for file in asked["files"])}
        self.datasets.setdefault(name, b"")
        self.created[name] = {"version": version, "files": files, "asked": asked}
        return {"ref": name, "url": f"https://www.kaggle.com/datasets/{name}", "status": "ok"}

    def CreateDatasetVersion(self, asked):
        name = self._dataset(asked)
        version = self.created.get(name, {"version": 1})["version"] + 1
        return self.CreateDataset(
            {**asked.get("body", asked), "ownerSlug": asked["ownerSlug"], "slug": asked["datasetSlug"]}, version
        )

    def SaveKernel(self, asked):
        version = self.kernels.get(asked["slug"], {"version": 0})["version"] + 1
        self.kernels[asked["slug"]] = {"version": version, "asked": asked}
        known = [*self.datasets, *self.competitions]
        unknown = {
            kind: [name for name in asked.get(f"{kind}DataSources", []) if name not in known]
            for kind in ("dataset", "competition")
        }
        places = {"ref": f"/code/{asked['slug']}", "url": f"https://www.kaggle.com/code/{asked['slug']}"}
        lost = {"invalidDatasetSources": unknown["dataset"], "invalidCompetitionSources": unknown["competition"]}
        return places | lost | {"versionNumber": version}

    def _competition(self, slug):
        if slug not in self.competitions:
            raise Refusal(404, "Not found")
        if slug in self.rules:
            raise Refusal(403, "You must accept this competition's rules before you'll be able to download files.")

    def _dataset(self, asked):
        name = f"{asked['ownerSlug']}/{asked['datasetSlug']}"
        if name not in self.datasets:
            raise Refusal(404, "Not found")
        return name

    def _blob(self, name):
        token = f"{len(self.blobs):04d}/{name}"
        self.blobs[token] = b""
        return {"token": token, "createUrl": f"{STORAGE}/upload/{token}?{SIGNATURE}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_POST(self):
        name, body = self._note(), self._body()
        try:
            step = self.kaggle.plan(name)
            if name != "IntrospectToken" and (name not in PUBLIC or "Authorization" in self.headers):
                self._check_account()
            answer = getattr(self.kaggle, name)(json.loads(body or b"{}"))
        except Refusal as no:
            text = {"code": no.status, "message": no.message} if no.message else {}
            return self._send(no.status, json.dumps(text).encode(), "application/json", no.headers)
        if step == "lose":
            self.close_connection = True
        elif isinstance(answer, str):
            self._send(302, b"", "text/html", {"Location": answer})
        else:
            self._send(200, json.dumps(answer).encode(), "application/json")

    def do_GET(self):
        self._note()
        kind, *name, _ = urlsplit(self.path).path.strip("/").split("/")
        content = getattr(self.kaggle, kind)["/".join(name)]
        etag = '"' + hashlib.md5(content).hexdigest() + '"'
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first and self.headers.get("If-Range", etag) == etag else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        about = {"Content-Type": "application/zip", "Content-Length": str(len(content) - start), "ETag": etag}
        about |= {"Accept-Ranges": "bytes", "Last-Modified": "Sat, 01 Feb 2025 10:00:00 GMT"}
        for header in about.items():
            self.send_header(*header)
        self.end_headers()
        cut, stall = (steps.pop(0) if steps else None for steps in (self.kaggle.cuts, self.kaggle.stalls))
        end = next((start + n for n in (cut, stall) if n is not None), len(content))
        try:
            self.wfile.write(content[start:end])
            self.wfile.flush()
        except OSError:
            self.close_connection = True
        if stall is not None:
            self.kaggle.wait()
        if end < len(content):
            self.close_connection = True

    def do_PUT(self):
        self._note("PUT")
        token, body = urlsplit(self.path).path.removeprefix("/upload/"), self._body()
        try:
            if self.kaggle.plan("PUT") == "lose":
                self.close_connection = True
                return
        except Refusal as no:
            return self._send(no.status, b"", "text/plain", no.headers)
        asked = self.headers.get("Content-Range", "")
        if asked.startswith("bytes */"):  # how much is there?
            got = len(self.kaggle.blobs[token])
            if got < int(asked[8:]):
                return self._send(308, b"", "text/plain", {"Range": f"bytes=0-{got - 1}"} if got else {})
        else:
            self.kaggle.blobs[token] += body
        self._send(200, b"", "text/plain")

    def _check_account(self):
        basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        if self.headers.get("Authorization") not in (basic, f"Bearer {TOKEN}"):
            raise Refusal(401, "Unauthenticated")

    def _note(self, name=None):
        address = urlsplit(self.path)
        self.kaggle.requests.append((self.command, f"{address.netloc}{address.path}", dict(self.headers)))
        return name or address.path.rsplit("/", 1)[-1]

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, body, kind, headers=()):
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client is gone
            self.close_connection = True


if __name__ == "__main__":  # for a try by hand: prints the variables to set
    with KaggleServer() as running:
        for name, value in running.environment("kaggle-home").items():
            print(f"export {name}={value}", flush=True)
        while True:
            time.sleep(60)
