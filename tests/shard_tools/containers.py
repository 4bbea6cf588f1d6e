"""The same clips as files, and inside a tar, a zip, a Parquet and an HDF5 file: what tests of sources build from."""

import io
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from pipeline.data.manifest import Label
from pipeline.flow import Clip
from shard_tools import sources
from shard_tools.catalogs import Catalog
from shard_tools.write import TarWriter

KINDS = ("tar", "zip", "parquet", "h5")
RATE = 16000


def recordings(count: int = 12, seconds: float = 0.1) -> list[bytes]:
    """WAVs of 16 kHz, each of its own tone."""
    found = []
    for number in range(count):
        wav = io.BytesIO()
        time = np.arange(round(seconds * RATE)) / RATE
        soundfile.write(wav, 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * time), RATE, format="WAV")
        found.append(wav.getvalue())
    return found


def pack(folder: Path, kind: str, wavs: list[bytes]) -> None:
    """Writes two containers, `a` with the first half of the recordings and `b` with the others."""
    folder.mkdir(parents=True, exist_ok=True)
    half = len(wavs) // 2
    for name, part in (("a", wavs[:half]), ("b", wavs[half:])):
        path = folder / f"{name}.{kind}"
        path.unlink(missing_ok=True)
        if kind == "tar":
            with path.open("wb") as file:
                tar = TarWriter(file)
                for number, wav in enumerate(part):
                    tar.add(f"./audio/{number}.wav", [wav])
                tar.close()
        elif kind == "zip":
            with zipfile.ZipFile(path, "w") as whole:
                for number, wav in enumerate(part):
                    method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
                    whole.writestr(f"audio/{number}.wav", wav, method)
        elif kind == "parquet":
            rows = [{"bytes": wav, "path": f"{name}{number}.wav"} for number, wav in enumerate(part)]
            ids = [f"{name}{number}" for number in range(len(part))]
            pq.write_table(pa.table({"id": ids, "audio": rows}), path, row_group_size=2)
        else:
            with h5py.File(path, "w") as file:
                file["waveform"] = np.stack([soundfile.read(io.BytesIO(wav), dtype="int16")[0] for wav in part])
                file.attrs["sample_rate"] = RATE


def catalog_of(folder: Path | str, kind: str, count: int = 12, known: bool = True) -> Catalog:
    """Of what `pack` wrote; `known`: with the places of the members."""
    catalog = Catalog(kind, folder, [Label(id="x", name="x")])
    number = 0
    for name in "ab":
        container = f"{folder}/{name}.{kind}"
        if kind in ("tar", "zip"):
            found = [(member.name, member.at) for member in sources.members([container])]
        else:
            found = [(f"{container}::{row}", (row // 2, row % 2) if kind == "parquet" else None)
                     for row in range(count // 2)]  # fmt: skip
        for path, at in found:
            catalog.clips.append(Clip(f"{number:03d}", path, 0.0, None, (0,), "train", at=at if known else None))
            number += 1
    return catalog
