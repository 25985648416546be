"""Models on the Hugging Face Hub, read by HTTP Range requests through the official client.

The client resolves revisions, tokens, endpoint and offline mode, and has its own cache of downloaded files. Ranges that
are neither there nor in our range cache are fetched in parallel and kept in the range cache.
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
    import huggingface_hub.constants  # noqa: F401  raises ValueError for a variable that is not a number
except ValueError as error:
    wrong = [name for name, value in os.environ.items() if name.startswith("HF_") and repr(value) in str(error)]
    raise ModelUnreadable(
        "the Hub's client can't start: one of its variables is not a number", f"correct or unset {', '.join(wrong)}"
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
from .source import CONFIG, INDEX, ByteSource, Range, is_inside, list_parts

PARALLEL = 4  # requests at a time
CHUNK = 16 * 2**20  # the most bytes of a request, and of a cached range
GAP = 4096  # the most unwanted bytes that are fetched to save a request
READ_AHEAD = 100_000  # bytes of the first read of a file; most headers fit, and cost one request
ATTEMPTS = 5  # to read a fetched range, which another process with a smaller limit may have deleted from the cache
MAX_JSON = 100_000_000  # bytes of a config or an index; the same limit as for headers
SMALL = 64 * 2**20  # bytes of the largest file that we take whole from a server that ignores Range
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
ENOUGH = 64 * 1024  # bytes; a connection that broke after this many does not count as a failure
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait, the length of the Hub's window for counting requests
TIMEOUT = 30.0  # seconds without a byte after which a connection counts as broken
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

CERTIFICATES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"})
PROXIES = frozenset({"ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"})
COMMIT = r"[0-9a-zA-Z]{1,64}"  # a commit on the Hub has 40 digits; other servers may name theirs otherwise

T = TypeVar("T")


class HubRepository:
    """A model repository at one commit, or one GGUF model in it; raises ModelUnreadable where it can't be reached.

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
                listing = ", ".join(sorted(gguf for gguf in self.files if gguf.endswith(".gguf"))[:20])
                raise ModelUnreadable(f"{name} has no file {file}", f"its GGUF files are {listing}" if listing else "")
            self.files &= {file, *list_parts(file)}

    def open(self, filename: str) -> ByteSource:
        """A file of the repository: the downloaded one, or else one that fetches the ranges that are read."""
        if filename not in self._open:
            downloaded = self._find_downloaded(filename)
            if filename.endswith(".json") and not (isinstance(downloaded, str) and _is_json(downloaded)):
                downloaded = self.retry(lambda: self._download(filename))
            is_local = isinstance(downloaded, str)
            self._open[filename] = LocalFile(Path(str(downloaded))) if is_local else HubFile(self, filename)
        return self._open[filename]

    def list_files(self) -> frozenset[str]:
        """All files of the repository."""
        return self.files

    def may_copy(self, filename: str) -> bool:
        """The Hub has no links."""
        return True

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Fetch the wanted ranges that are in no cache, neighbours together, by a few requests at a time."""
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
            self._stopped.set()  # each request that is under way ends when its next bytes come in
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
            self.cache.trim()

    def received(self, count: int) -> None:
        """Count bytes that arrived; raises ModelUnreadable if their job was cancelled."""
        with self._lock:
            self.bytes_fetched += count
        if self._stopped.is_set():
            raise ModelUnreadable(f"reading {self.name} was cancelled")

    def retry(self, function: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        """Call `function`, with growing delays after errors that may pass.

        `done` is the number of bytes that have arrived; after ENOUGH of them, the delays start again from the first
        one. Raises ModelUnreadable for an error that does not pass.
        """
        failures, before = 0, done()
        while True:
            try:
                _start_client()
                return function()
            except (HfHubHTTPError, httpx2.RequestError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
                cause: BaseException = error
                if isinstance(error, LocalEntryNotFoundError):
                    # the client has retried this itself
                    raise explain(error.__cause__ or error, self.name, self._wanted_revision) from None
            except _BadAnswer as error:
                cause = error
            except HFValidationError:
                raise ModelUnreadable(f"{self.name} is neither a file nor a folder nor a valid Hub id") from None
            except (httpx2.InvalidURL, UnicodeEncodeError):
                raise ModelUnreadable(
                    "HF_ENDPOINT is not a URL, or HF_TOKEN is not a token", "correct or unset them"
                ) from None
            if done() >= before + ENOUGH:
                failures, before = 0, done()
            if failures >= len(RETRY_DELAYS) or not _may_pass(cause):
                raise explain(cause, self.name, self._wanted_revision)
            if self._stopped.wait(max(RETRY_DELAYS[failures], _seconds_to_wait(cause))):
                raise ModelUnreadable(f"reading {self.name} was cancelled")
            failures += 1

    def note(self, kind: str, subject: str, facts: dict[str, Any]) -> None:
        """Keep facts on disk for later runs, which may have no network; without a place to write, they are lost."""
        with contextlib.suppress(OSError):
            write_checked(self._note_path(kind, subject), json.dumps(facts))

    def noted(self, kind: str, subject: str) -> dict[str, Any]:
        """The facts that `note` kept, {} where there are none."""
        try:
            facts: dict[str, Any] = json.loads(read_checked(self._note_path(kind, subject)))
            return facts
        except (OSError, ValueError):
            return {}

    def _note_path(self, kind: str, subject: str) -> Path:
        digest = hashlib.sha256(f"{ENDPOINT}\n{self.name}\n{subject}".encode()).hexdigest()
        return cache_folder() / kind / f"{digest[:32]}.json"

    def _find_downloaded(self, filename: str) -> object:
        """The path, a str, of a file that the Hub's client has downloaded; another object where it has none."""
        return try_to_load_from_cache(self.name, filename, revision=self.revision)

    def _download(self, filename: str) -> str:
        """The path of a JSON file that the Hub's client has downloaded; a broken one is downloaded again."""
        downloaded = self._find_downloaded(filename)
        try:
            if isinstance(downloaded, str) and not _is_json(downloaded):
                blob = Path(os.path.realpath(downloaded))
                os.unlink(downloaded)  # or the client would keep it; it is a link to a blob, or a file
                if blob.parent.name == "blobs":
                    blob.unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the client warns of a disk with little room; without room it fails
                path = hf_hub_download(self.name, filename, revision=self.revision, tqdm_class=_Meter)
        except (HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError):
            raise
        except OSError as error:
            if error.errno is None:  # the client raises this where the length is not that which the Hub gave
                raise _BadAnswer(f"{filename} of {self.name} arrived incomplete") from None
            raise ModelUnreadable(
                f"can't write to the cache of the Hub's client: {error.strerror}", "set HF_HOME to a folder with room"
            ) from None
        if not os.path.getsize(path):  # the client believes a server that gives 0 as the length
            raise _BadAnswer(f"{filename} of {self.name} arrived incomplete")
        return path

    def _resolve(self) -> tuple[str, frozenset[str]]:
        """The commit of the wanted revision and its files; without a network, as known from earlier runs."""
        try:
            commit, files = self.retry(self._ask)
        except _Unreachable:
            if known := self._resolve_offline():
                return known
            raise
        self.note("refs", self._wanted_revision, {"commit": commit, "files": sorted(files)})
        return commit, files

    def _ask(self) -> tuple[str, frozenset[str]]:
        """The commit of the wanted revision and its files, by the Hub."""
        try:
            info = HfApi().model_info(self.name, revision=self._wanted_revision, timeout=TIMEOUT)
            if not re.fullmatch(COMMIT, str(info.sha)):
                raise ValueError("no commit")
            files = (str(sibling.rfilename) for sibling in info.siblings or [])
            return str(info.sha), frozenset(filter(is_inside, files))
        except (HfHubHTTPError, HFValidationError, UnicodeEncodeError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _BadAnswer(f"the server that answered for {self.name} is not the Hub") from None

    def _resolve_offline(self) -> tuple[str, frozenset[str]] | None:
        """The commit of the wanted revision and its files, by our notes or the files that the client has downloaded."""
        facts = self.noted("refs", self._wanted_revision)
        noted = (facts["commit"], frozenset(facts["files"])) if facts else None
        known = (CONFIG, INDEX, "model.safetensors", self._wanted_file)
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
    """A file on the Hub, which is fetched by ranges."""

    def __init__(self, repository: HubRepository, name: str) -> None:
        self.repository = repository
        self.name = name
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return int(self._facts["size"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The size and version of the file, which we ask for only once, since a commit never changes."""
        subject = f"{self.repository.revision}/{self.name}"
        known = self.repository.noted("files", subject)
        if known:
            return known
        metadata = self.repository.retry(lambda: get_hf_file_metadata(self._url))
        if metadata.size is None or metadata.etag is None:
            raise ModelUnreadable(f"the Hub does not say how long {self.name} is")
        facts = {"size": metadata.size, "etag": metadata.etag}
        self.repository.note("files", subject, facts)
        return facts

    @property
    def _url(self) -> str:
        return hf_hub_url(self.repository.name, self.name, revision=self.repository.revision)

    @cached_property
    def _key(self) -> str:
        """The key of this version of the file in the range cache."""
        return hashlib.sha256(f"{ENDPOINT}\n{self._facts['etag']}\n{self.size}".encode()).hexdigest()[:32]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), which are fetched where they are not in the cache.

        Raises ModelUnreadable where they can't be fetched, or the cache does not keep them.
        """
        cache = self.repository.cache
        data = cache.read(self._key, start, stop)
        if data is None:
            with self._lock:  # a thread that waits here may find its bytes in the cache afterwards
                data = cache.read(self._key, start, stop)
                for _ in range(ATTEMPTS):
                    if data is None:
                        for chunk in self.missing_chunks([(start, min(max(stop, start + READ_AHEAD), self.size))]):
                            self.fetch(*chunk)
                        data = cache.read(self._key, start, stop)
        if data is None:
            raise ModelUnreadable(
                f"the cache {cache.folder} loses files right after they are written",
                "set LAZARUS_CACHE to another folder",
            )
        return data

    def missing_chunks(self, ranges: Sequence[Range]) -> list[Range]:
        """The ranges, one for each request, that fetch the parts of `ranges` that are not in the cache."""
        gaps = merge(self.repository.cache.missing(self._key, ranges), GAP)
        return [(low, min(low + CHUNK, stop)) for start, stop in gaps for low in range(start, stop, CHUNK)]

    def fetch(self, start: int, stop: int, count: Callable[[int], None] = lambda received: None) -> None:
        """Fetch a range into the cache, resuming after a broken connection; `count` is called with the bytes that
        arrived."""
        if not self.repository.cache.missing(self._key, [(start, stop)]):
            return  # another thread has fetched it
        received = bytearray()

        def go_on() -> None:
            nonlocal start, stop
            headers = build_hf_headers() | {
                "Range": f"bytes={start + len(received)}-{stop - 1}",
                "Accept-Encoding": "identity",
            }
            # when httpx follows a redirect to another host, it does not send the token there
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
                raise _BadAnswer(f"a server sent a wrong number of bytes of {self.name}")

        self.repository.retry(go_on, lambda: len(received))
        self.repository.cache.write(self._key, start, bytes(received))

    def _is_whole(self, response: httpx2.Response, start: int, stop: int) -> bool:
        """Whether the answer is the whole file, rather than the range [start, stop); raises where it is neither."""
        if response.status_code == 206:
            if response.headers.get("Content-Range", "") in (f"bytes {start}-{stop - 1}/{n}" for n in (self.size, "*")):
                return False
            raise _BadAnswer(f"a server sent a wrong range of {self.name}")
        if response.is_error:
            response.read()
            hf_raise_for_status(response)
        if response.status_code != 200 or self.size <= SMALL:
            if response.status_code == 200 and response.headers.get("Content-Length") == str(self.size):
                return True
            raise _BadAnswer(f"a server sent something other than {self.name}")
        raise ModelUnreadable(
            "a server between here and the Hub ignores Range requests",
            f"run: hf download {self.repository.name}, then try again",
        )


class _Meter(tqdm):
    """A progress bar for the Hub's client that shows nothing, and ends a download that is too long for JSON."""

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
    """Whether a file is JSON, rather than the half of it that a crash may leave.

    A file that is too large or can't be read passes, so that its reader raises the proper error.
    """
    try:
        if os.path.getsize(path) <= MAX_JSON:
            json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return False
    except OSError:
        pass
    return True


def _start_client() -> None:
    """Make the Hub's client read certificates and proxies; raises _Unreachable where they are wrong."""
    try:
        get_session()
        return
    except ImportError:
        what, names = "a SOCKS proxy needs the package socksio", PROXIES
    except OSError as error:
        what, names = str(error.strerror), CERTIFICATES
    except (ValueError, httpx2.InvalidURL):  # the text of the error may contain a password
        what, names = "a proxy's address is not a URL", PROXIES
    given = ", ".join(name for name in os.environ if name.upper() in names)
    raise _Unreachable(f"the Hub's client can't start: {what}", given and f"correct or unset {given}")


class _BadAnswer(Exception):
    """An answer that makes no sense; the next one may."""


class _Unreachable(ModelUnreadable):
    """Raised if there is no network, or it must not be used."""


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, HfHubHTTPError):
        if error.response is None:
            return False
        expired = error.response.status_code == 403 and bool(error.response.history)  # a redirect's signed URL
        return expired or error.response.status_code in TRANSIENT
    return isinstance(error, httpx2.TransportError | _BadAnswer)


def _seconds_to_wait(error: BaseException) -> float:
    """The seconds that the server asks us to wait, at most LONGEST_WAIT.

    They are in `Retry-After`, or are the rest of a window whose requests are used up
    (`RateLimit: "resolver";r=0;t=55`, draft-ietf-httpapi-ratelimit-headers-09).
    """
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None:
        return 0.0
    text, limit = response.headers.get("Retry-After", ""), parse_ratelimit_headers(response.headers)
    asked = float(text) if text.isdecimal() else 0.0
    if limit and response.status_code == 429:
        asked = max(asked, limit.reset_in_seconds)
    return min(LONGEST_WAIT, asked)


def explain(error: BaseException, name: str, revision: str) -> MoEError:
    """An error of the Hub's client as an error for the user, without the token and the URL, which may be signed."""
    match error:
        case GatedRepoError():
            return ModelUnreadable(f"{name} is gated", "accept its terms on its Hub page, then set HF_TOKEN")
        case RepositoryNotFoundError():
            return ModelUnreadable(
                f"{name} is neither a folder here nor a model on the Hub, or it is private",
                "check the spelling; for a private model set HF_TOKEN",
            )
        case RevisionNotFoundError():
            return ModelUnreadable(f"{name} has no revision {revision}")
        case OfflineModeIsEnabled():
            return _Unreachable(
                f"{name} is not completely on this machine, and HF_HUB_OFFLINE forbids fetching it",
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
                    f"the Hub's rate limit is reached, and retries did not help (429 for {name})",
                    "wait some minutes; HF_TOKEN gives a higher limit",
                )
            if status in (401, 403):
                return ModelUnreadable(
                    f"the Hub refuses access to {name} ({status})", "set HF_TOKEN to a token that has access"
                )
            return ModelUnreadable(f"the Hub answered {status} for {name}", "try again later")
        case _BadAnswer():
            return ModelUnreadable(str(error), "try again, or download the model first")
    return ModelUnreadable(f"the server that answered for {name} is not the Hub", "check HF_ENDPOINT")
