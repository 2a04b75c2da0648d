"""Local servers that behave as NSD's bucket, COCO's server and the Hugging Face hub do; and misbehave when told to."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0" * 40


class Site:
    """What a server has, and how it misbehaves.

    files {path: bytes}; the hub's are repositories: {"datasets/owner/name" or "owner/name": {path: bytes}}.
    """

    def __init__(self, files=None, repositories=None):
        self.files, self.repositories = files or {}, repositories or {}
        self.asked = []  # (method, path, Range) of every request
        self.drop_after = None  # bytes of a body after which the connection is cut
        self.drops = 10**9  # how often that happens
        self.has_ranges, self.has_etags, self.etag_prefix = True, True, ""
        self.status = {}  # path -> status that is answered instead
        self.pause = {}  # path -> seconds before the body
        self.busy = Counter()  # path -> how often 503 is answered first
        self.claimed_size = {}  # path -> total of Content-Range
        self.instead = None  # (status, headers, text) that is answered to everybody, as by a network's login page,
        self.instead_after = 0  # from this number of requests on
        self.clock, self.back_at = 0.0, float("inf")  # and until this time of a clock that the test sets
        self.sent = Counter()  # path -> bytes of bodies, without the question for the size
        self.tokens = []  # (path, Authorization) of every request
        self.run_out = 0  # how many of the addresses that the hub redirects to have run out when they are asked
        self.at_once = self.most_at_once = 0  # bodies that are being sent
        self.lock = threading.Lock()

    def etag(self, content):
        return f'"{self.etag_prefix}{hashlib.md5(content).hexdigest()}"'

    def bodies_of(self, path):
        """Ranges of the requests for a file's body, but for the question for its size."""
        return [asked for method, name, asked in self.asked if (method, name) == ("GET", path)
                and asked != "bytes=0-0"]


@contextmanager
def serve(site):
    """Yield the URL of a server of `site`."""
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *request: None  # a client that hangs up is no news
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        site, path = self.site, unquote(urlsplit(self.path).path)
        with site.lock:
            site.asked.append((self.command, path, self.headers.get("Range")))
            site.tokens.append((path, self.headers.get("Authorization")))
            if site.instead and len(site.asked) > site.instead_after and site.clock < site.back_at:
                status, headers, text = site.instead
                return self.plain(status, text if body else "", headers)
            busy = site.busy[path] > 0
            site.busy[path] -= busy
        if busy or path in site.status:
            return self.plain(503 if busy else site.status[path])
        if path in site.files:
            etag = {"ETag": site.etag(site.files[path])} if site.has_etags else {}
            return self.send_file(path, site.files[path], etag, body)
        self.answer_as_hub(path, body)

    # --- the hub's API --------------------------------------------------------------------------------------------

    def answer_as_hub(self, path, body):
        for name, files in self.site.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            if path == f"{api}/revision/main" or path == api:
                return self.plain(200, json.dumps({"id": name, "sha": COMMIT, "siblings": [
                    {"rfilename": file} for file in files]}))
            if re.fullmatch(rf"{api}/tree/(main|{COMMIT})", path):
                return self.plain(200, json.dumps([self.entry(file, content) for file, content in files.items()]))
            resolved = re.fullmatch(rf"/{name}/resolve/(?:main|{COMMIT})/(.+)", path)
            if resolved and resolved[1] in files:
                return self.redirect(path, files[resolved[1]])
            if resolved:
                return self.plain(404, headers={"X-Error-Code": "EntryNotFound"})
        if path.startswith("/signed/"):
            return self.answer_as_store(path, body)
        self.plain(404, headers={"X-Error-Code": "RepoNotFound"} if path.startswith("/api/") else {})

    def redirect(self, path, content):
        """To where the file lies, which is another host, at an address that may run out."""
        address = f"http://localhost:{self.server.server_port}/signed{quote(path)}"
        self.plain(302, headers={"Location": address, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content)),
                                 "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def answer_as_store(self, path, body):
        name, file = re.fullmatch(r"/signed/(.+)/resolve/[^/]+/(.+)", path).groups()
        with self.site.lock:
            has_run_out = self.site.run_out > 0
            self.site.run_out -= has_run_out
        if has_run_out or self.headers.get("Authorization"):  # S3 does not take both, either
            return self.plain(403 if has_run_out else 400)
        content = self.site.repositories[name][file]
        self.send_file(f"{name}/{file}", content, {"ETag": self.site.etag(content)}, body)

    @staticmethod
    def entry(file, content):
        sha = hashlib.sha256(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": "1" * 40,
                "lfs": {"oid": sha, "size": len(content), "pointerSize": 134}}

    # --- bodies ---------------------------------------------------------------------------------------------------

    def plain(self, status, text="", headers=None):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(text)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def send_file(self, path, content, headers, body):
        site, asked = self.site, self.headers.get("Range")
        part, status = content, 200
        if asked and site.has_ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
            if first > last:
                return self.plain(416)
            part, status = content[first:last + 1], 206
            headers = {**headers, "Content-Range":
                       f"bytes {first}-{last}/{site.claimed_size.get(path, len(content))}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        with site.lock:
            site.at_once += 1
            site.most_at_once = max(site.most_at_once, site.at_once)
        if len(part) > 1:
            time.sleep(site.pause.get(path, 0))
        with site.lock:
            site.at_once -= 1
            cut = site.drop_after is not None and len(part) > site.drop_after and site.drops > 0
            site.drops -= cut
            part = part[:site.drop_after] if cut else part
            site.sent[path] += len(part) if asked != "bytes=0-0" else 0
        try:
            self.wfile.write(part)
        except ConnectionError:  # the client had enough
            cut = True
        if cut:
            self.close_connection = True
