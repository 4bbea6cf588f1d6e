"""Bad files: each is handled right or listed with its reason, and the build goes on."""

import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile

from pipeline.data.manifest import load_index, load_manifest
from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.catalogs import clean_key
from shard_tools.decode import DecodeError, decode
from shard_tools.plan import BuildOptions
from shard_tools.verify_shards import verify
from shard_tools.write import AudioOptions
from tests.shard_tools.corpus import KEPT, SECONDS, SILENT, UNTOLD, Case, make_corpus, sound

RATE = 16000
IN_SHARDS = (KEPT, SILENT, UNTOLD)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder data set of one class, and the table of fates."""
    root = tmp_path_factory.mktemp("corpus")
    return root, make_corpus(root / "sound")


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    root, _ = corpus
    out = tmp_path_factory.mktemp("built")
    catalog = catalogs.folder(root, "train")
    (root / "sound" / "vanishes.wav").unlink()  # between listing and reading
    summary = build(catalog, out, BuildOptions(AudioOptions(seconds=SECONDS), 64), workers=2)
    return out, summary


def meets(case: Case, reason: str | None) -> bool:
    """None: the clip is in the shards."""
    fates = (case.fate,) if isinstance(case.fate, str) else case.fate
    return any(fate in IN_SHARDS if reason is None else reason.startswith(fate) for fate in fates)


def likeness(waveform: np.ndarray) -> float:
    """Largest correlation with the sound that was put in, over all shifts."""
    ours, put_in = waveform - waveform.mean(), sound()[: len(waveform), 0]
    size = 1 << 17
    shifts = np.fft.irfft(np.fft.rfft(ours, size) * np.conj(np.fft.rfft(put_in, size)))
    return float(shifts.max() / np.linalg.norm(ours) / np.linalg.norm(put_in))


def test_every_file_meets_its_fate(corpus, built):
    _, cases = corpus
    assert len(cases) >= 200
    out, summary = built
    lines = [json.loads(line) for line in (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {os.path.basename(line["path"]): line["reason"] for line in lines}
    rows = {row["key"]: row for row in load_index(out).to_pylist()}
    kept = [case for case in cases if case.name not in reasons]
    wrong = [(case, reasons.get(case.name)) for case in cases if not meets(case, reasons.get(case.name))]
    assert wrong == []
    assert len(reasons) == len(lines)
    assert len(rows) == len(kept)  # every file is in one of the two, once
    assert load_manifest(out).splits["train"].listed == len(cases) == len(rows) + len(lines)
    silent = 0
    for case in kept:
        row = rows[clean_key(f"sound/{case.name}")]
        with (out / row["shard"]).open("rb") as file:
            file.seek(row["waveform_offset"])
            waveform = np.load(file, allow_pickle=False)
            file.seek(row["json_offset"])
            about = json.loads(file.read(row["json_size"]).decode("utf-8"))
        assert about["source"] == f"sound/{case.name}"
        silent += about["silent"]
        if case.fate != UNTOLD:
            assert row["seconds"] == pytest.approx(case.seconds, abs=0.1), case
        if case.fate == KEPT:
            assert likeness(waveform[: round(row["seconds"] * RATE)].astype(np.float64)) > 0.9, case
            assert abs(waveform.astype(np.float64).mean()) < 1.0, case  # DC is gone
        assert about["silent"] == (case.fate == SILENT), case
    assert silent == summary.silent == sum(case.fate == SILENT for case in cases)
    assert summary.failures.total() == len(lines)


def test_the_shards_are_sound_and_their_members_stay_inside(built):
    out, _ = built
    assert verify(out, workers=1) == []
    names: Counter[str] = Counter()
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.isreg()
                stem, _, extension = member.name.partition(".")
                assert extension in ("waveform.npy", "fbank.npy", "json")
                assert stem.replace("-", "").replace("_", "").isalnum()
                assert stem.isascii()
                assert "/" not in member.name
                names[member.name] += 1
    assert set(names.values()) == {1}


def test_what_its_user_may_not_read(tmp_path):
    """Root reads everything, so another user asks."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o11)
    path = tmp_path / "forbidden.wav"
    soundfile.write(path, sound(), RATE)
    path.chmod(0)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        with pytest.raises(DecodeError, match="unreadable: Permission denied"):
            decode(str(path), 0.0, None, rate=RATE, seconds=1)
    finally:
        os.seteuid(user)
