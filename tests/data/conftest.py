"""Shards in an S3 store."""

from pathlib import Path

import pytest

from tests.stores import upload


@pytest.fixture(scope="session")
def s3_shards(shards: Path, s3: str) -> str:
    """URL of the fixture `shards` in the store."""
    return upload(shards, "shards")
