"""Shards in an S3 store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores import s3_server, upload


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of moto's S3 server; the environment points clients and child processes at it."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_shards(shards: Path, s3: str) -> str:
    """URL of the fixture `shards` in the store."""
    return upload(shards, "shards")
