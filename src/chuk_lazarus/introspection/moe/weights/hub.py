"""Models on the Hugging Face Hub, read by HTTP Range through the official client.

The client resolves revisions, tokens, endpoint, offline mode and its own cache of downloaded files. Ranges that are in
neither cache are fetched, a few at a time, and kept in the range cache.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, is_offline_mode
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
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ..errors import ModelUnreadable, MoEError
from .range_cache import RangeCache, cache_folder, cache_limit, merge
from .source import ByteSource, LocalFile, Progress, Range

PARALLEL = 4
CHUNK = 16 * 2**20  # bytes of one request, so of one cached range
GAP = 4096  # fetch this many unwanted bytes rather than make another request
READ_AHEAD = 100_000  # most headers fit in it, so that one costs a single request
SMALL = 64 * 2**20  # a file that we take whole from a server that ignores Range
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
TIMEOUT = httpx2.Timeout(30.0)
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

T = TypeVar("T")


class HubRepository:
    """A model repository at one commit; raises ModelUnreadable when it can't be had."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self.bytes_fetched = 0
        self.cache = RangeCache(cache_folder(), cache_limit())
        self._wanted_revision = revision or "main"
        self._lock = threading.Lock()
        self._open: dict[str, ByteSource] = {}
        self.revision, self.files = self._resolve()

    def open(self, filename: str) -> ByteSource:
        """A file of the repository: a downloaded one if there is, else one that fetches what is read."""
        if filename not in self._open:
            downloaded = try_to_load_from_cache(self.name, filename, revision=self.revision)
            if not isinstance(downloaded, str) and filename.endswith(".json"):
                downloaded = self._call(lambda: hf_hub_download(self.name, filename, revision=self.revision))
            self._open[filename] = (
                LocalFile(Path(downloaded)) if isinstance(downloaded, str) else HubFile(self, filename)
            )
        return self._open[filename]

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Fetch what of the wanted ranges is not here yet, neighbours merged, a few requests at a time."""
        jobs = []
        for filename, ranges in wanted.items():
            source = self.open(filename)
            if isinstance(source, HubFile):
                jobs += [(source, *chunk) for chunk in source.missing_chunks(ranges)]
        total = sum(stop - start for _, start, stop in jobs)
        done = 0

        def count(received: int) -> None:
            nonlocal done
            with self._lock:
                done += received
                progress("downloading", done, total)

        pool = ThreadPoolExecutor(PARALLEL)
        try:
            for job in as_completed([pool.submit(source.fetch, start, stop, count) for source, start, stop in jobs]):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if jobs:
            self.cache.trim()

    def add_fetched(self, received: int) -> None:
        with self._lock:
            self.bytes_fetched += received

    def _resolve(self) -> tuple[str, frozenset[str]]:
        """The commit that the wanted revision is, and its files; from what we know already when there is no network."""
        try:
            info = self._call(lambda: HfApi().model_info(self.name, revision=self._wanted_revision))
        except _Unreachable as error:
            if known := self._resolve_offline():
                return known
            raise ModelUnreadable(error.message, error.hint) from None
        files = frozenset(sibling.rfilename for sibling in info.siblings or [])
        self.remember("refs", self._wanted_revision, {"commit": info.sha, "files": sorted(files)})
        return str(info.sha), files

    def _resolve_offline(self) -> tuple[str, frozenset[str]] | None:
        noted = self.recall("refs", self._wanted_revision)
        if isinstance(noted.get("commit"), str) and isinstance(noted.get("files"), list):
            return noted["commit"], frozenset(str(file) for file in noted["files"])
        for filename in ("config.json", "model.safetensors.index.json", "model.safetensors"):
            path = try_to_load_from_cache(self.name, filename, revision=self._wanted_revision)
            if isinstance(path, str):
                snapshot = Path(path).parent
                return snapshot.name, frozenset(file.name for file in snapshot.iterdir())
        return None

    def remember(self, kind: str, what: str, facts: dict[str, Any]) -> None:
        """Note facts that hold without the network; a note that can't be written is not missed."""
        path = self._note(kind, what)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{threading.get_ident()}.part")
            temporary.write_text(json.dumps(facts))
            temporary.replace(path)
        except OSError:
            return

    def recall(self, kind: str, what: str) -> dict[str, Any]:
        """The facts noted, {} when there are none."""
        try:
            facts = json.loads(self._note(kind, what).read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def _note(self, kind: str, what: str) -> Path:
        digest = hashlib.sha256(f"{ENDPOINT}\n{self.name}\n{what}".encode()).hexdigest()
        return cache_folder() / kind / f"{digest[:32]}.json"

    def _call(self, function: Callable[[], T]) -> T:
        return retrying(self.name, self._wanted_revision, function)


class HubFile:
    """A file on the Hub, fetched by ranges."""

    def __init__(self, repository: HubRepository, name: str) -> None:
        self.repository = repository
        self.name = name

    @property
    def size(self) -> int:
        return int(self._facts["size"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Size and version of the file; a commit never changes, so they are asked for only once."""
        what = f"{self.repository.revision}/{self.name}"
        known = self.repository.recall("files", what)
        if type(known.get("size")) is int and isinstance(known.get("etag"), str):
            return known
        found = self._call(lambda: get_hf_file_metadata(self._url))
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
        for _ in range(2):  # a second time where the first read found a damaged range
            for chunk in self.missing_chunks([(start, min(max(stop, start + READ_AHEAD), self.size))]):
                self.fetch(*chunk, lambda received: None)
            data = cache.read(self._key, start, stop)
            if data is not None:
                return data
        raise ModelUnreadable(f"the cache {cache.folder} loses what is put into it", "set LAZARUS_CACHE elsewhere")

    def missing_chunks(self, ranges: Sequence[Range]) -> list[Range]:
        """The requests that would bring what is not here yet."""
        gaps = merge(self.repository.cache.missing(self._key, ranges), GAP)
        return [(low, min(low + CHUNK, stop)) for start, stop in gaps for low in range(start, stop, CHUNK)]

    def fetch(self, start: int, stop: int, count: Callable[[int], None]) -> None:
        """Fetch one range into the cache; a broken connection goes on where it broke."""
        received = bytearray()

        def go_on() -> None:
            for data in self._stream(start + len(received), stop):
                received.extend(data)
                self.repository.add_fetched(len(data))
                count(len(data))

        self._call(go_on, lambda: len(received))
        self.repository.cache.write(self._key, start, bytes(received))

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        if start == stop:
            return
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        # httpx does not send the token on to another host when it follows a redirect
        with get_session().stream(
            "GET", self._url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code == 200 and self.size <= SMALL:
                skip = start
            elif response.status_code == 206:
                expected = f"bytes {start}-{stop - 1}/{self.size}"
                if response.headers.get("Content-Range") != expected:
                    raise _BadAnswer(f"a server sent another range of {self.name} than was asked for")
                skip = 0
            else:
                if response.is_error:
                    response.read()
                hf_raise_for_status(response)
                raise ModelUnreadable(
                    f"a server between here and the Hub ignores Range requests (it answered {response.status_code})",
                    f"run: hf download {self.repository.name}, then try again",
                )
            left = stop - start
            for data in response.iter_raw():
                wanted = data[skip : skip + left]
                skip, left = max(0, skip - len(data)), left - len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return
            raise _BadAnswer(f"a server ended {self.name} {left} bytes too early")

    def _call(self, function: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        return retrying(self.repository.name, self.repository.revision, function, done)


class _BadAnswer(Exception):
    """An answer that makes no sense; the next one may."""


class _Unreachable(MoEError):
    """There is no network, or it is not to be used."""

    exit_code = ModelUnreadable.exit_code


def retrying(name: str, revision: str, function: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
    """Call `function`, again after a while where the fault may pass, and tell the user where it does not.

    `done` counts what has been achieved; as long as it grows, the retries start anew. Raises ModelUnreadable.
    """
    failures, before = 0, done()
    while True:
        try:
            return function()
        except (
            HfHubHTTPError,
            httpx2.TransportError,
            OfflineModeIsEnabled,
            LocalEntryNotFoundError,
            _BadAnswer,
        ) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            if done() > before:
                failures, before = 0, done()
            if failures >= len(RETRY_DELAYS) or not _may_pass(cause):
                raise explain(cause, name, revision) from None
            time.sleep(max(RETRY_DELAYS[failures], _retry_after(cause)))
            failures += 1
        except HFValidationError:
            raise ModelUnreadable(f"{name} is neither a file nor a folder nor a valid Hub id") from None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT
    return isinstance(error, httpx2.TransportError | _BadAnswer)


def _retry_after(error: BaseException) -> float:
    """The seconds that the server asks us to wait, at most two minutes."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return min(120.0, float(text)) if text.isdecimal() else 0.0


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
        case EntryNotFoundError():
            return ModelUnreadable(f"a file of {name} is missing on the Hub")
        case HfHubHTTPError() if error.response is not None:
            status = error.response.status_code
            if status in (401, 403):
                return ModelUnreadable(
                    f"the Hub refuses access to {name} ({status})", "set HF_TOKEN to a token that may"
                )
            return ModelUnreadable(f"the Hub answered {status} for {name}", "try again later")
        case OfflineModeIsEnabled():
            return _Unreachable(
                f"{name} is not, or not all, on this machine, and HF_HUB_OFFLINE forbids to fetch it",
                "unset HF_HUB_OFFLINE",
            )
        case _BadAnswer():
            return ModelUnreadable(str(error), "try again, or download the model first")
    return _Unreachable(
        f"can't reach the Hub for {name}: {type(error).__name__}",
        "HF_HUB_OFFLINE is set" if is_offline_mode() else "check the network and HF_ENDPOINT",
    )
