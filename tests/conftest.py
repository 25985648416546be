"""A Hub of our own on loopback for every test, and caches that no other run shares."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from hub_server import HubServer
from sampling import THOROUGH, examples
from trained_models import GEMMA3, SMOLLM2

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # several tests run at once, and BLAS is loaded later
    os.environ.setdefault(_variable, "1")

settings.register_profile(
    "any machine",
    max_examples=examples(100),
    derandomize=not THOROUGH,  # a rare case is found by the long run, and does not stop the short one
    deadline=None,  # which is of time on the clock
)
settings.load_profile("any machine")

_server = HubServer()
_home = tempfile.TemporaryDirectory(prefix="lazarus-tests-")


def pytest_configure() -> None:
    """Point the Hub's client at our server before anything imports it: it reads its settings once."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        os.environ.pop(name, None)
    _server.__enter__()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests start Python hundreds of times
    os.environ |= {
        "HF_ENDPOINT": _server.url,
        "HF_HOME": f"{_home.name}/hf",
        "HF_HUB_VERBOSITY": "critical",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "LAZARUS_CACHE": f"{_home.name}/lazarus",
    }


@pytest.hookimpl(tryfirst=True)  # before the choice by marks
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark as long the cases of a test marked `sample` of whose arguments each has had its value in a case before."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            known = seen.setdefault(item.nodeid.partition("[")[0], set())
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            if values <= known:
                item.add_marker(pytest.mark.long)
            known |= values


def pytest_unconfigure() -> None:
    _server.__exit__(None, None, None)
    _home.cleanup()


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The GGUF file of a trained dense model of 30 layers."""
    assert request.config.cache
    return SMOLLM2.fetch(request.config.cache.mkdir("smollm2"))


@pytest.fixture(scope="session")
def gemma3(request: pytest.FixtureRequest) -> Path:
    """The GGUF file of another, of 18 layers."""
    assert request.config.cache
    return GEMMA3.fetch(request.config.cache.mkdir("gemma3"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The loopback Hub, without faults and with an empty log."""
    _server.faults.clear()
    _server.clear_requests()
    yield _server
    _server.faults.clear()
    assert not _server.leaks, "a token reached another host"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty range cache."""
    monkeypatch.setenv("LAZARUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
