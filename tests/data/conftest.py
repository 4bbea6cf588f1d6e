"""Shards in an S3 store, and which bytes are read."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.stores import upload


@pytest.fixture(scope="session")
def s3_shards(shards: Path, s3: str) -> str:
    """URL of the fixture `shards` in the store."""
    return upload(shards, "shards")


@pytest.fixture
def asked(monkeypatch) -> Counter[str]:
    """File name -> bytes that this process has asked of it at an offset."""
    counts: Counter[str] = Counter()
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        counts[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return counts
