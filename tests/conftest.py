"""What all tests share."""

import os

import pytest
import scratch

# Nothing here may wait for a network that a test machine does not have.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_unconfigure() -> None:
    scratch.remove()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep circuits and keys that tests make out of the user's cache, and the user's out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
