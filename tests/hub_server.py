"""A loopback stand-in for the Hugging Face Hub and its CDN, with a request log and injectable faults."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from processor_time import HANGS

LFS_SUFFIXES = (".safetensors", ".bin")
"""Files with these suffixes are redirected to the CDN; the Hub itself sends all others."""

CHUNK = 64 * 1024
_MODIFIED = "2024-01-01T00:00:00.000Z"
_VERBS = "revision|tree|refs|paths-info"
_API = re.compile(
    rf"/api/models/(?P<repo>[^/]+(?:/(?!(?:{_VERBS})(?:/|$))[^/]+)?)"
    rf"(?:/(?P<verb>{_VERBS})(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Request:
    """One request as a server saw it, with what was answered."""

    server: Literal["hub", "cdn"]
    method: str
    path: str
    """The path of the URL, without its query string."""
    host: str
    range: str | None
    authorization: str | None
    repo: str = ""
    file: str = ""
    """The name of the file in its repository, on the CDN too, or empty for the API."""
    status: int = 0
    """The status answered, or 0 while the answer has not begun."""
    bytes_sent: int = 0
    """The body bytes handed to the socket, which a client that hangs up need not have read."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """All request headers, with names in lower case."""

    @property
    def name(self) -> str:
        """Return `repo/file` for a file and the path of the URL for anything else."""
        return f"{self.repo}/{self.file}" if self.file else self.path


@dataclass
class Fault:
    """A misbehaviour of the servers, given to the requests it matches until it is used up."""

    path: str = ""
    """A suffix, or a glob pattern, of `Request.name`; everything by default."""
    when: Callable[[Request], bool] | None = None
    """A further condition on the request."""
    method: str | None = "GET"
    """The method it applies to, or None for any."""
    where: Literal["body", "resolve", "api"] = "body"
    """The step it applies to: whichever server sends the file, the Hub's /resolve/ (a redirect if LFS), the API."""
    times: int | None = 1
    """How many requests it applies to, or None for no limit."""
    skip: int = 0
    """How many matching requests pass unharmed first."""
    stall: float = 0.0
    """Wait this many seconds before answering; combines with everything below."""
    status: int | None = None
    """Answer this status instead."""
    retry_after: str | None = None
    """The Retry-After header to send with `status`."""
    headers: dict[str, str] = field(default_factory=dict)
    """More headers to send with `status`."""
    expire: bool = False
    """Expire all URLs signed so far, the requested one included (for `where="body"` on LFS files)."""
    ignore_range: bool = False
    """Answer 200 with the whole file whatever range was asked for."""
    content_range: str | None = None
    """The Content-Range header of a 206, in which {start}, {end} and {size} stand for the true numbers."""
    truncate: int | None = None
    """Send at most this many body bytes, in an answer whose Content-Length agrees."""
    short_body: int | None = None
    """Send at most this many body bytes, then close in order, with a Content-Length that promises all of them."""
    cut_after: int | None = None
    """Send at most this many body bytes, then reset the connection."""
    extra: int | None = None
    """Send so many zeros after the body of a file, in chunks: an answer that does not say how long it is."""
    hits: int = 0
    """How many requests it was applied to."""

    def claim(self, request: Request, steps: tuple[str, ...]) -> bool:
        """Return whether the fault applies to a request, counting it if so."""
        if self.where not in steps or self.method not in (None, request.method):
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        if not fnmatchcase(request.name, "*" + self.path) or (self.when is not None and not self.when(request)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class _File:
    """A served file with the identifiers that Git and Git LFS give it."""

    source: Path
    name: str
    size: int
    sha256: str
    blob_id: str
    pointer_size: int

    @property
    def lfs(self) -> bool:
        """Return whether the CDN serves the file."""
        return self.name.endswith(LFS_SUFFIXES)

    @property
    def etag(self) -> str:
        """Return the ETag the Hub states for the file."""
        return f'"{self.sha256 if self.lfs else self.blob_id}"'

    def tree_entry(self) -> dict[str, Any]:
        """Return the file as the tree API describes it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.blob_id, "size": self.size, "path": self.name}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return entry

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """Return the file as the model API describes it."""
        entry: dict[str, Any] = {"rfilename": self.name}
        if blobs:
            entry |= {"size": self.size, "blobId": self.blob_id}
            if self.lfs:
                entry["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return entry


@dataclass
class _Repo:
    """A repository: its commits, the one that `main` names, and who may read it."""

    name: str
    commits: dict[str, dict[str, _File]]
    main: str
    gated: bool
    token: str | None


@dataclass(eq=False)
class _Error(Exception):
    """An error answer of the Hub."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)


def _scan(folder: Path, source: Path) -> _File:
    """Return the description of a file on disk."""
    name, size = source.relative_to(folder).as_posix(), source.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with source.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n".encode()
    if name.endswith(LFS_SUFFIXES):
        blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer)
    return _File(source, name, size, sha256.hexdigest(), blob.hexdigest(), len(pointer))


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the half-open range asked for, None for the whole file, or an empty range if it is unsatisfiable."""
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    if last and int(last) < int(first):
        return None
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else (size, size)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, as the Hub or as the CDN."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._serve()

    def do_HEAD(self) -> None:
        """Answer a HEAD."""
        self._serve()

    def do_POST(self) -> None:
        """Answer a POST."""
        self._serve()

    def _serve(self) -> None:
        """Log the request, find the fault it meets and answer it."""
        hub, url = self.server.hub, urlsplit(self.path)
        self.form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.sent = 0
        request = Request(
            server=self.server.role,
            method=self.command,
            path=url.path,
            host=self.headers.get("Host", ""),
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
            headers={key.lower(): value for key, value in self.headers.items()},
        )
        signed = resolve = None
        steps: tuple[str, ...]
        if self.server.role == "cdn":
            steps = ("body",)
            signed = hub._signed_file(self.query.get("Signature", ""), url.path)
            if signed:
                request = replace(request, repo=signed[0], file=signed[1].name)
        elif url.path.startswith("/api/"):
            steps = ("api",)
        else:
            resolve = _RESOLVE.fullmatch(url.path)
            if resolve:
                request = replace(request, repo=unquote(resolve["repo"]), file=unquote(resolve["file"]))
            steps = ("resolve",) if request.file.endswith(LFS_SUFFIXES) else ("resolve", "body")
        self.index = hub._log(request)
        fault = hub._claim(request, steps) or Fault(method=None)
        if fault.stall:
            self.server.closing.wait(fault.stall)
        if fault.expire:
            hub.expire_urls()
        if fault.status is not None:
            extra = dict(fault.headers)
            if fault.retry_after is not None:
                extra["Retry-After"] = fault.retry_after
            self._send_json(fault.status, {"error": f"Injected fault {fault.status}"}, extra, fault)
        elif self.server.role == "cdn":
            if signed is None or not hub._signature_valid(self.query["Signature"]):
                denied = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
                self._send(403, {"Content-Type": "application/xml"}, denied, fault)
            else:
                self._send_file(signed[1], f'"{signed[1].sha256[:32]}"', {}, fault)
        else:
            try:
                if resolve:
                    self._resolve(request, unquote(resolve["revision"]), fault)
                else:
                    self._api(request, fault)
            except _Error as error:
                headers = {"X-Error-Message": error.message, **error.headers}
                if error.code:
                    headers["X-Error-Code"] = error.code
                self._send_json(error.status, {"error": error.message}, headers, fault)

    def _resolve(self, request: Request, revision: str, fault: Fault) -> None:
        """Send a small file, or redirect to the CDN for an LFS file."""
        repo = self.server.hub._access(request, files=True)
        commit, files = self._revision(repo, revision)
        found = files.get(request.file)
        headers = {"X-Repo-Commit": commit}
        if found is None:
            raise _Error(404, "EntryNotFound", "Entry not found", headers)
        if not found.lfs:
            return self._send_file(found, found.etag, headers, fault)
        location = self.server.hub._sign(repo.name, found)
        headers |= {
            "Location": location,
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(found.size),
            "X-Linked-Etag": found.etag,
            "Content-Type": "text/plain; charset=utf-8",
        }
        self._send(302, headers, f"Found. Redirecting to {location}".encode(), fault)

    def _api(self, request: Request, fault: Fault) -> None:
        """Answer a request for the description of a repository."""
        match = _API.fullmatch(request.path)
        if match is None:
            raise _Error(404, "", "Sorry, we can't find the page you are looking for.")
        repo = self.server.hub._access(replace(request, repo=unquote(match["repo"])), files=False)
        verb = match["verb"]
        if verb == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main}
            return self._send_json(
                200, {"branches": [branch], "converts": [], "tags": [], "pullRequests": []}, {}, fault
            )
        commit, files = self._revision(repo, unquote(match["revision"] or "main"))
        answer: Any
        if verb == "tree":
            recursive = self.query.get("recursive", "").lower() in ("1", "true")
            answer = self._tree(files, unquote(match["path"] or ""), recursive, commit)
        elif verb == "paths-info":
            wanted = parse_qs(self.form).get("paths", [])
            answer = [files[name].tree_entry() for name in wanted if name in files]
        else:
            blobs = self.query.get("blobs", "").lower() in ("1", "true")
            answer = {
                "_id": repo.main[:24],
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit,
                "private": repo.token is not None and not repo.gated,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": _MODIFIED,
                "lastModified": _MODIFIED,
                "siblings": [found.sibling(blobs) for found in files.values()],
            }
        self._send_json(200, answer, {}, fault)

    def _revision(self, repo: _Repo, revision: str) -> tuple[str, dict[str, _File]]:
        """Return the commit that a revision names and its files."""
        commit = repo.main if revision == "main" else revision
        if commit not in repo.commits:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def _tree(self, files: dict[str, _File], path: str, recursive: bool, commit: str) -> list[dict[str, Any]]:
        """Return the files and folders under a path as the tree API lists them."""
        prefix, entries = f"{path}/" if path else "", {}
        for name, found in files.items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = found.tree_entry()
        if path and not entries:
            raise _Error(404, "EntryNotFound", f"{path} does not exist on this revision", {"X-Repo-Commit": commit})
        return list(entries.values())

    def _send_json(self, status: int, value: Any, headers: Mapping[str, str], fault: Fault) -> None:
        """Send a JSON answer."""
        self._send(
            status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(value).encode(), fault
        )

    def _send_file(self, found: _File, etag: str, headers: Mapping[str, str], fault: Fault) -> None:
        """Send a file, or the part of it that was asked for."""
        name = found.name.rpartition("/")[2]
        whole = {
            **headers,
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream" if found.lfs else "text/plain; charset=utf-8",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";",
        }
        asked = self.headers.get("Range") if self.command == "GET" and not fault.ignore_range else None
        if self.headers.get("If-Range") not in (None, etag):
            asked = None
        part = _parse_range(asked, found.size)
        if part is None:
            return self._send(200, whole, (found.source, 0, found.size), fault)
        start, stop = part
        if start >= stop:
            refused = {**headers, "Content-Range": f"bytes */{found.size}", "Content-Type": "text/plain"}
            return self._send(416, refused, b"Requested Range Not Satisfiable", fault)
        template = fault.content_range or "bytes {start}-{end}/{size}"
        whole["Content-Range"] = template.format(start=start, end=stop - 1, size=found.size)
        self._send(206, whole, (found.source, start, stop), fault)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes | tuple[Path, int, int], fault: Fault) -> None:
        """Send an answer whose body is given or is a range of a file, as the fault allows."""
        full = len(body) if isinstance(body, bytes) else body[2] - body[1]
        length = full if fault.truncate is None else min(full, fault.truncate)
        limits = [limit for limit in (length, fault.short_body, fault.cut_after) if limit is not None]
        broken = fault.short_body is not None or fault.cut_after is not None
        self.server.hub._answered(self.index, status, 0)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        chunked = fault.extra is not None and self.command != "HEAD" and not isinstance(body, bytes)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(length))))
        self.end_headers()
        remaining = 0 if self.command == "HEAD" else min(limits)
        if isinstance(body, bytes):
            self._send_chunk(status, body[:remaining])
        elif remaining:
            with body[0].open("rb") as stream:
                stream.seek(body[1])
                while remaining and (chunk := stream.read(min(CHUNK, remaining))):
                    self._send_chunk(status, chunk, chunked)
                    remaining -= len(chunk)
        if chunked:
            for start in range(0, fault.extra or 0, CHUNK):
                self._send_chunk(status, bytes(min(CHUNK, (fault.extra or 0) - start)), chunked)
            self.wfile.write(b"0\r\n\r\n")
        if broken:
            self.close_connection = True
            if fault.cut_after is not None:
                self.server.reset(self.connection)

    def _send_chunk(self, status: int, chunk: bytes, framed: bool = False) -> None:
        """Send a piece of the body, counted beforehand so that a client that has it finds it in the log."""
        if not chunk:
            return
        self.server.hub._answered(self.index, status, self.sent + len(chunk))
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if framed else chunk)
        except OSError:
            self.server.hub._answered(self.index, status, self.sent)
            raise
        self.sent += len(chunk)


class _Server(ThreadingHTTPServer):
    """A server that knows its connections, so that closing it neither waits for them nor leaves them behind."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, hub: HubServer, role: Literal["hub", "cdn"]) -> None:
        """Bind to a free port of the loopback interface and serve from a thread."""
        self.hub, self.role = hub, role
        self.closing = threading.Event()
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._open: dict[Any, threading.Thread] = {}
        self._resets: set[Any] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self._loop = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._loop.start()

    def server_bind(self) -> None:
        """Bind without asking the name service for the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own."""
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def reset(self, request: Any) -> None:
        """Have a connection end in a reset, once its data have arrived."""
        end = time.monotonic() + HANGS
        while unsent(request) and not self.closing.is_set() and time.monotonic() < end:
            self.closing.wait(0.005)
        self.closing.wait(0.05)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with self._lock:
            self._resets.add(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, in order unless it is to be reset."""
        with self._lock:
            self._open.pop(request, None)
            hard = request in self._resets
            self._resets.discard(request)
        if hard:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep an error of the server's own; clients that hang up are none."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)

    def close(self) -> None:
        """Stop listening, hang up on all clients and wait for the threads to end."""
        self.closing.set()
        self.shutdown()
        self._loop.join()
        with self._lock:
            connections = list(self._open.items())
        for request, thread in connections:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        self.server_close()


def unsent(connection: socket.socket) -> int:
    """How many bytes the other side has not acknowledged; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    waiting = array("i", [0])
    with suppress(OSError):  # it has hung up
        fcntl.ioctl(connection, termios.TIOCOUTQ, waiting)
    return waiting[0]


class HubServer:
    """A Hub with repositories taken from folders, for `HF_ENDPOINT`, and the CDN it redirects to.

    The Hub is at 127.0.0.1 and the CDN at localhost on another port, so that the two differ in host and origin.
    """

    url: str
    cdn_url: str

    def __init__(self) -> None:
        """Make a server without repositories, which starts to listen when its context is entered."""
        self.url = self.cdn_url = ""
        self.faults: list[Fault] = []
        self._repos: dict[str, _Repo] = {}
        self._requests: list[Request] = []
        self._cleared = 0
        self._signed: dict[str, tuple[str, str, _File]] = {}
        self._valid: set[str] = set()
        self._lock = threading.RLock()
        self._servers: list[_Server] = []

    def __enter__(self) -> HubServer:
        """Start to listen."""
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn_url = f"http://localhost:{self._servers[1].server_port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop both servers, and raise an error of their own if there was one and nothing else is being raised."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        own = [problem for server in servers for problem in server.errors]
        if own and error is None:
            raise own[0]

    def add(
        self, repo: str, folder: Path, *, commit: str | None = None, gated: bool = False, token: str | None = None
    ) -> str:
        """Serve the files under a folder as a commit of a model repository, make it `main` and return it.

        The commit defaults to one derived from the repository's name, and a second call with another one adds to the
        first. A token makes the repository private to it. A gated repository can be described by everyone, while its
        files are for the token alone, or for no one.
        """
        commit = commit or hashlib.sha1(repo.encode()).hexdigest()
        files = {found.name: found for found in (_scan(folder, p) for p in sorted(folder.rglob("*")) if p.is_file())}
        with self._lock:
            commits = self._repos[repo].commits if repo in self._repos else {}
            self._repos[repo] = _Repo(repo, {**commits, commit: files}, commit, gated, token)
        return commit

    def fail(self, **fields: Any) -> Fault:
        """Add a fault, described by the fields of `Fault`, after those already there, and return it."""
        fault = Fault(**fields)
        with self._lock:
            self.faults.append(fault)
        return fault

    def expire_urls(self) -> None:
        """Make the CDN refuse every URL signed so far."""
        with self._lock:
            self._valid.clear()

    @property
    def requests(self) -> list[Request]:
        """Return the requests to both servers in the order of their arrival."""
        with self._lock:
            return self._requests[self._cleared :]

    def clear_requests(self) -> None:
        """Forget the requests made so far."""
        with self._lock:
            self._cleared = len(self._requests)

    @property
    def leaks(self) -> list[Request]:
        """Return the requests that carried credentials to the CDN."""
        return [request for request in self.requests if request.server == "cdn" and request.authorization is not None]

    def body_bytes(self, suffix: str = ".safetensors") -> int:
        """Return how many bytes of files with a suffix were sent in answer to GETs, by either server."""
        return sum(
            request.bytes_sent
            for request in self.requests
            if request.method == "GET" and request.status in (200, 206) and request.file.endswith(suffix)
        )

    def _log(self, request: Request) -> int:
        """Log a request and return its place in the log."""
        with self._lock:
            self._requests.append(request)
            return len(self._requests) - 1

    def _answered(self, index: int, status: int, sent: int) -> None:
        """Complete the log entry of a request."""
        with self._lock:
            self._requests[index] = replace(self._requests[index], status=status, bytes_sent=sent)

    def _claim(self, request: Request, steps: tuple[str, ...]) -> Fault | None:
        """Return the first fault that applies to a request."""
        with self._lock:
            return next((fault for fault in self.faults if fault.claim(request, steps)), None)

    def _sign(self, repo: str, found: _File) -> str:
        """Return a new URL at which the CDN serves a file."""
        with self._lock:
            serial = f"{len(self._signed)}:{repo}:{found.sha256}"
            signature = hashlib.sha256(serial.encode()).hexdigest()
            path = f"/repos/{found.sha256[:2]}/{found.sha256[2:4]}/{found.sha256}"
            self._signed[signature] = (path, repo, found)
            self._valid.add(signature)
        disposition = f'attachment; filename="{found.name.rpartition("/")[2]}";'
        query = {"response-content-disposition": disposition, "Expires": "4102444800", "Signature": signature}
        return f"{self.cdn_url}{path}?{urlencode(query)}"

    def _signed_file(self, signature: str, path: str) -> tuple[str, _File] | None:
        """Return the repository and file that a URL was signed for."""
        with self._lock:
            found = self._signed.get(signature)
        return found[1:] if found and found[0] == path else None

    def _signature_valid(self, signature: str) -> bool:
        """Return whether a signature has not expired."""
        with self._lock:
            return signature in self._valid

    def _access(self, request: Request, *, files: bool) -> _Repo:
        """Return the repository a request is about, or raise the Hub's refusal."""
        with self._lock:
            repo = self._repos.get(request.repo)
        scheme, _, token = (request.authorization or "").partition(" ")
        known = scheme.lower() == "bearer" and token != ""
        if repo is None:
            if known:
                raise _Error(404, "RepoNotFound", "Repository not found")
            raise _Error(401, "RepoNotFound", "Invalid username or password.")
        if repo.token is not None and known and token == repo.token:
            return repo
        if repo.gated:
            if not files:
                return repo
            restricted = f"Access to model {repo.name} is restricted"
            if known:
                raise _Error(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")
            raise _Error(401, "GatedRepo", f"{restricted}. You must be authenticated to access it. Please log in.")
        if repo.token is not None:
            if known:
                raise _Error(401, "", "Invalid credentials in Authorization header")
            raise _Error(401, "RepoNotFound", "Invalid username or password.")
        return repo
