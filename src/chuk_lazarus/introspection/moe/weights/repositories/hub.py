"""Models on the Hugging Face Hub, read by HTTP Range through the official client.

The client resolves revisions, tokens, endpoint, offline mode and its own cache of downloaded files. Ranges that are in
neither cache are fetched, a few at a time, and kept in the range cache.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from ...errors import ModelUnreadable, MoEError

try:
    import huggingface_hub.constants  # noqa: F401  which reads the environment
except ValueError as error:
    wrong = [name for name, value in os.environ.items() if name.startswith("HF_") and repr(value) in str(error)]
    raise ModelUnreadable(
        "the Hub's client can't start: one of its variables is no number", f"correct or unset {', '.join(wrong)}"
    ) from None
from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    tqdm,
)

from ...files import cache_folder, read_checked, write_checked
from ...progress import Progress
from .local import LocalFile
from .range_cache import RangeCache, cache_limit, merge
from .source import ByteSource, Range, is_inside, list_parts

PARALLEL = 4
CHUNK = 16 * 2**20  # bytes of one request, so of one cached range
GAP = 4096  # fetch this many unwanted bytes rather than make another request
READ_AHEAD = 100_000  # most headers fit in it, so that one costs a single request
ATTEMPTS = 5  # to read what was fetched: another process that keeps to a smaller limit may delete it in between
MAX_JSON = 100_000_000  # bytes of a config or an index, as of a header
SMALL = 64 * 2**20  # a file that we take whole from a server that ignores Range
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
ENOUGH = 64 * 1024  # bytes; a connection that breaks after so many is worth another one
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait: the Hub counts requests in windows as long
TIMEOUT = 30.0  # seconds without a byte after which a connection counts as broken
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

CERTIFICATES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"})
PROXIES = frozenset({"ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"})
COMMIT = r"[0-9a-zA-Z]{1,64}"  # the Hub's have 40 digits

T = TypeVar("T")


class HubRepository:
    """A model repository at one commit, or one GGUF file of it; raises ModelUnreadable when it can't be had.

    `bytes_fetched` counts the bytes of weight files that came over the network.
    """

    folder = None

    def __init__(self, name: str, revision: str | None, file: str | None = None) -> None:
        self.name = name
        self.bytes_fetched = 0
        self.cache = RangeCache(cache_folder(), cache_limit())
        self._wanted_revision = revision or "main"
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: dict[str, ByteSource] = {}
        self._wanted_file = file
        self.revision, self.files = self._resolve()
        if file:
            if file not in self.files:
                there = ", ".join(sorted(other for other in self.files if other.endswith(".gguf"))[:20])
                raise ModelUnreadable(f"{name} has no file {file}", f"its GGUF files are {there}" if there else "")
            self.files &= {file, *list_parts(file)}

    def open(self, filename: str) -> ByteSource:
        """A file of the repository: a downloaded one if there is, else one that fetches what is read."""
        if filename not in self._open:
            downloaded = self._find_downloaded(filename)
            if filename.endswith(".json") and not (isinstance(downloaded, str) and _is_json(downloaded)):
                downloaded = self.persist(lambda: self._download(filename))
            local = isinstance(downloaded, str)
            self._open[filename] = LocalFile(Path(str(downloaded))) if local else HubFile(self, filename)
        return self._open[filename]

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Fetch what of the wanted ranges is not here yet, neighbours merged, a few requests at a time."""
        self.cache.begin()
        jobs = []
        for filename, ranges in wanted.items():
            source = self.open(filename)
            if isinstance(source, HubFile):
                jobs += [(source, *chunk) for chunk in source.missing_chunks(ranges)]
        if not jobs:
            return
        total = sum(stop - start for _, start, stop in jobs)
        done = 0

        def count(received: int) -> None:
            nonlocal done
            with self._lock:
                done += received
                progress("downloading", min(done, total), total)

        pool = ThreadPoolExecutor(PARALLEL)
        try:
            for job in as_completed([pool.submit(source.fetch, start, stop, count) for source, start, stop in jobs]):
                job.result()
        except BaseException:
            self._stopped.set()  # ends each request that is under way with its next bytes
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
            self.cache.trim()

    def received(self, count: int) -> None:
        """Note bytes that came in; raises ModelUnreadable when the job that they belong to has been given up."""
        with self._lock:
            self.bytes_fetched += count
        if self._stopped.is_set():
            raise ModelUnreadable(f"reading {self.name} was given up")

    def persist(self, function: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        """Call `function`, again after a while where the fault may pass, and tell the user where it does not.

        `done` counts bytes that have come; whenever ENOUGH of them have, the retries start anew. Raises
        ModelUnreadable.
        """
        failures, before = 0, done()
        while True:
            try:
                _start_client()
                return function()
            except (HfHubHTTPError, httpx2.RequestError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
                cause: BaseException = error
                if isinstance(error, LocalEntryNotFoundError):
                    # the client has already tried this again itself
                    raise explain(error.__cause__ or error, self.name, self._wanted_revision) from None
            except _BadAnswer as error:
                cause = error
            except HFValidationError:
                raise ModelUnreadable(f"{self.name} is neither a file nor a folder nor a valid Hub id") from None
            except (httpx2.InvalidURL, UnicodeEncodeError):
                raise ModelUnreadable("HF_ENDPOINT is no URL, or HF_TOKEN no token", "correct or unset them") from None
            if done() >= before + ENOUGH:
                failures, before = 0, done()
            if failures >= len(RETRY_DELAYS) or not _may_pass(cause):
                raise explain(cause, self.name, self._wanted_revision)
            if self._stopped.wait(max(RETRY_DELAYS[failures], _seconds_to_wait(cause))):
                raise ModelUnreadable(f"reading {self.name} was given up")
            failures += 1

    def remember(self, kind: str, what: str, facts: dict[str, Any]) -> None:
        """Note facts that hold without the network; a note that can't be written is not missed."""
        with contextlib.suppress(OSError):
            write_checked(self._note(kind, what), json.dumps(facts))

    def recall(self, kind: str, what: str) -> dict[str, Any]:
        """The facts noted, {} when there are none."""
        try:
            facts: dict[str, Any] = json.loads(read_checked(self._note(kind, what)))
            return facts
        except (OSError, ValueError):
            return {}

    def _note(self, kind: str, what: str) -> Path:
        digest = hashlib.sha256(f"{ENDPOINT}\n{self.name}\n{what}".encode()).hexdigest()
        return cache_folder() / kind / f"{digest[:32]}.json"

    def _find_downloaded(self, filename: str) -> object:
        """The place of a file that the Hub's client has, a str, or something else."""
        return try_to_load_from_cache(self.name, filename, revision=self.revision)

    def _download(self, filename: str) -> str:
        there = self._find_downloaded(filename)
        try:
            if isinstance(there, str) and not _is_json(there):
                blob = Path(os.path.realpath(there))
                os.unlink(there)  # the client would keep it; snapshots are links to blobs, or files
                if blob.parent.name == "blobs":
                    blob.unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of little room: where there is too little, an error follows
                path = hf_hub_download(self.name, filename, revision=self.revision, tqdm_class=_Meter)
        except (HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError):
            raise
        except OSError as error:
            if error.errno is None:  # its length is not what the Hub said
                raise _BadAnswer(f"{filename} of {self.name} came incomplete") from None
            raise ModelUnreadable(
                f"can't write to the cache of the Hub's client: {error.strerror}", "set HF_HOME to a folder with room"
            ) from None
        if not os.path.getsize(path):  # a server had said so, and the client believed it
            raise _BadAnswer(f"{filename} of {self.name} came incomplete")
        return path

    def _resolve(self) -> tuple[str, frozenset[str]]:
        """The commit that the wanted revision is, and its files; from what we know already if there is no network."""
        try:
            commit, files = self.persist(self._ask)
        except _Unreachable:
            if known := self._resolve_offline():
                return known
            raise
        self.remember("refs", self._wanted_revision, {"commit": commit, "files": sorted(files)})
        return commit, files

    def _ask(self) -> tuple[str, frozenset[str]]:
        try:
            info = HfApi().model_info(self.name, revision=self._wanted_revision, timeout=TIMEOUT)
            if not re.fullmatch(COMMIT, str(info.sha)):
                raise ValueError("no commit")
            files = (str(sibling.rfilename) for sibling in info.siblings or [])
            return str(info.sha), frozenset(filter(is_inside, files))
        except (HfHubHTTPError, HFValidationError, UnicodeEncodeError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _BadAnswer(f"what answers in the Hub's place for {self.name} is not the Hub") from None

    def _resolve_offline(self) -> tuple[str, frozenset[str]] | None:
        note = self.recall("refs", self._wanted_revision)
        noted = (note["commit"], frozenset(note["files"])) if note else None
        known = ("config.json", "model.safetensors.index.json", "model.safetensors", self._wanted_file)
        for filename in filter(None, known):
            path = try_to_load_from_cache(self.name, filename, revision=self._wanted_revision)
            if isinstance(path, str):
                snapshot = Path(path.removesuffix(filename))
                files = frozenset(
                    file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if not file.is_dir()
                )
                if noted and noted[0] == snapshot.name:
                    return noted
                if not noted or any(file.endswith((".safetensors", ".gguf")) for file in files):
                    return snapshot.name, files
        return noted


class HubFile:
    """A file on the Hub, fetched by ranges."""

    def __init__(self, repository: HubRepository, name: str) -> None:
        self.repository = repository
        self.name = name
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return int(self._facts["size"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Size and version of the file; a commit never changes, so they are asked for only once."""
        what = f"{self.repository.revision}/{self.name}"
        known = self.repository.recall("files", what)
        if known:
            return known
        found = self.repository.persist(lambda: get_hf_file_metadata(self._url))
        if found.size is None or found.etag is None:
            raise ModelUnreadable(f"the Hub does not say how long {self.name} is")
        facts = {"size": found.size, "etag": found.etag}
        self.repository.remember("files", what, facts)
        return facts

    @property
    def _url(self) -> str:
        return hf_hub_url(self.repository.name, self.name, revision=self.repository.revision)

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(f"{ENDPOINT}\n{self._facts['etag']}\n{self.size}".encode()).hexdigest()[:32]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), fetched where the cache has not got them."""
        cache = self.repository.cache
        data = cache.read(self._key, start, stop)
        if data is None:
            with self._lock:  # what is fetched here serves the next reader, too
                data = cache.read(self._key, start, stop)
                for _ in range(ATTEMPTS):
                    if data is None:
                        for chunk in self.missing_chunks([(start, min(max(stop, start + READ_AHEAD), self.size))]):
                            self.fetch(*chunk)
                        data = cache.read(self._key, start, stop)
        if data is None:
            raise ModelUnreadable(f"the cache {cache.folder} loses what is put into it", "set LAZARUS_CACHE elsewhere")
        return data

    def missing_chunks(self, ranges: Sequence[Range]) -> list[Range]:
        """The requests that would bring what is not here yet."""
        gaps = merge(self.repository.cache.missing(self._key, ranges), GAP)
        return [(low, min(low + CHUNK, stop)) for start, stop in gaps for low in range(start, stop, CHUNK)]

    def fetch(self, start: int, stop: int, count: Callable[[int], None] = lambda received: None) -> None:
        """Fetch one range into the cache; a broken connection goes on where it broke."""
        if not self.repository.cache.missing(self._key, [(start, stop)]):
            return  # it came with another range
        received = bytearray()

        def go_on() -> None:
            nonlocal start, stop
            headers = build_hf_headers() | {
                "Range": f"bytes={start + len(received)}-{stop - 1}",
                "Accept-Encoding": "identity",
            }
            # httpx does not send the token on to another host when it follows a redirect
            stream = get_session().stream("GET", self._url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
            with stream as response:
                if self._is_whole(response, start + len(received), stop):
                    start, stop = 0, self.size
                    received.clear()
                for data in response.iter_raw():
                    received.extend(data)
                    self.repository.received(len(data))
                    count(len(data))
                    if len(received) > stop - start:
                        received.clear()
                        break
            if len(received) != stop - start:
                raise _BadAnswer(f"a server sent more or less of {self.name} than was asked for")

        self.repository.persist(go_on, lambda: len(received))
        self.repository.cache.write(self._key, start, bytes(received))

    def _is_whole(self, response: httpx2.Response, start: int, stop: int) -> bool:
        """Whether the answer is the whole file and not the range [start, stop); raises when it is neither."""
        if response.status_code == 206:
            if response.headers.get("Content-Range", "") in (f"bytes {start}-{stop - 1}/{n}" for n in (self.size, "*")):
                return False
            raise _BadAnswer(f"a server sent another range of {self.name} than was asked for")
        if response.is_error:
            response.read()
            hf_raise_for_status(response)
        if response.status_code != 200 or self.size <= SMALL:
            if response.status_code == 200 and response.headers.get("Content-Length") == str(self.size):
                return True
            raise _BadAnswer(f"a server sent something else in place of {self.name}")
        raise ModelUnreadable(
            "a server between here and the Hub ignores Range requests",
            f"run: hf download {self.repository.name}, then try again",
        )


class _Meter(tqdm):
    """A progress bar of the Hub's client that shows nothing, and stops the download of what is too long for JSON."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]
        self._received = 0
        self._check(self.total or 0)

    def update(self, n: float | None = 1) -> None:
        self._received += int(n or 0)
        self._check(self._received)

    def _check(self, size: float) -> None:
        if size > MAX_JSON:
            raise ModelUnreadable(f"a JSON file of the model is longer than {MAX_JSON:,} bytes")


def _is_json(path: str) -> bool:
    """Whether a file has JSON in it, and not the half of it that a broken machine leaves; others judge what is huge."""
    try:
        if os.path.getsize(path) <= MAX_JSON:
            json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return False
    except OSError:  # it is for the reader to say what is wrong
        pass
    return True


def _start_client() -> None:
    """Have the Hub's client take up certificates and proxies; raises _Unreachable."""
    try:
        get_session()
        return
    except ImportError:
        what, names = "a SOCKS proxy needs the package socksio", PROXIES
    except OSError as error:
        what, names = str(error.strerror), CERTIFICATES
    except (ValueError, httpx2.InvalidURL):  # whose text may have a password in it
        what, names = "a proxy's address is no URL", PROXIES
    given = ", ".join(name for name in os.environ if name.upper() in names)
    raise _Unreachable(f"the Hub's client can't start: {what}", given and f"correct or unset {given}")


class _BadAnswer(Exception):
    """An answer that makes no sense; the next one may."""


class _Unreachable(ModelUnreadable):
    """There is no network, or it is not to be used."""


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        if error.response is None:
            return False
        expired = error.response.status_code == 403 and bool(error.response.history)  # a signed URL, after a redirect
        return expired or error.response.status_code in TRANSIENT
    return isinstance(error, httpx2.TransportError | _BadAnswer)


def _seconds_to_wait(error: BaseException) -> float:
    """The seconds that the server asks us to wait: by `Retry-After`, or the rest of a window whose requests are used up
    (`RateLimit: "resolver";r=0;t=55`, draft-ietf-httpapi-ratelimit-headers-09)."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None:
        return 0.0
    text, limit = response.headers.get("Retry-After", ""), parse_ratelimit_headers(response.headers)
    asked = float(text) if text.isdecimal() else 0.0
    if limit and response.status_code == 429:
        asked = max(asked, limit.reset_in_seconds)
    return min(LONGEST_WAIT, asked)


def explain(error: BaseException, name: str, revision: str) -> MoEError:
    """What the user should know of an error of the Hub's client; never the URL, which may be signed, nor the token."""
    match error:
        case GatedRepoError():
            return ModelUnreadable(f"{name} is gated", "accept its terms on its Hub page, then set HF_TOKEN")
        case RepositoryNotFoundError():
            return ModelUnreadable(
                f"{name} is no folder here and no model on the Hub, or a private one",
                "check the spelling; for a private model set HF_TOKEN",
            )
        case RevisionNotFoundError():
            return ModelUnreadable(f"{name} has no revision {revision}")
        case OfflineModeIsEnabled():
            return _Unreachable(
                f"{name} is not, or not all, on this machine, and HF_HUB_OFFLINE forbids to fetch it",
                "unset HF_HUB_OFFLINE",
            )
        case LocalEntryNotFoundError() | httpx2.RequestError():
            return _Unreachable(f"can't reach the Hub for {name}", "check the network and HF_ENDPOINT")
        case EntryNotFoundError():
            return ModelUnreadable(f"a file of {name} is missing on the Hub")
        case HfHubHTTPError() if error.response is not None:
            status = error.response.status_code
            if status == 429:
                return ModelUnreadable(
                    f"the Hub's limit of requests is used up, and stays so (429 for {name})",
                    "wait some minutes; HF_TOKEN gives a higher limit",
                )
            if status in (401, 403):
                return ModelUnreadable(
                    f"the Hub refuses access to {name} ({status})", "set HF_TOKEN to a token that may"
                )
            return ModelUnreadable(f"the Hub answered {status} for {name}", "try again later")
        case _BadAnswer():
            return ModelUnreadable(str(error), "try again, or download the model first")
    return ModelUnreadable(f"what answers in the Hub's place for {name} is not the Hub", "check HF_ENDPOINT")
