"""What must not change from one commit to the next, as hashes and numbers by name.

Out of `measure`: name -> `Entry`. The inputs are the shards and runs of former/, which were written once and for all,
and the files of `tests/shard_tools/corpus.py`.

Sound coders, transforms and matrix products round in their own way on each processor and in each release. So an
entry's `exact` hashes are compared only where `machine()` is that of the kept file, and its `numbers` exactly there
and to a share of `within` elsewhere; `always` holds on every machine.
"""

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from pipeline.config import FinetuneRecipe
from pipeline.data import show
from pipeline.data.manifest import load_index
from pipeline.recipes import load_recipe
from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.plan import BuildOptions
from shard_tools.write import AudioOptions
from tests.helpers import digests
from tests.invariance import training
from tests.ranks import run_ranks
from tests.shard_tools.corpus import CODECS, SECONDS, make_corpus

KEPT = Path(__file__).with_name("hashes.json")
BATCHES = 20
LAYOUTS = ((1, 0), (1, 2), (3, 0), (3, 2))  # ranks, workers of each
AUGMENTED = """augment.mixup=0.5 augment.roll=0.02 augment.noise=0.1 augment.noise_snr=[10,20] augment.freq_mask=6
  augment.time_mask=3 run.seed=3"""
SAMPLERS = {
    "shuffled": "augment.mixup=0 augment.freq_mask=0 augment.time_mask=0",
    "shuffled, augmented": AUGMENTED,
    "balanced, augmented": f"{AUGMENTED} data.sampler=balanced",
    "balanced, without replacement": "data.sampler=balanced data.replacement=false data.epoch_clips=9 augment.mixup=0",
}


@dataclass
class Entry:
    """What is known of one thing: see the module."""

    always: str = ""
    exact: dict[str, str] = field(default_factory=dict)
    numbers: str = ""  # float.hex of each
    within: float = 1e-5


def machine() -> dict[str, str]:
    """What rounding depends on."""
    packages = ("torch", "numpy", "soundfile", "soxr", "av", "imageio-ffmpeg", "pyarrow")
    processor = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith(("vendor_id", "cpu family", "model\t"))][:3]  # fmt: skip
    return {
        "processor": " ".join([platform.machine(), *processor]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "libsndfile": soundfile.__libsndfile_version__,
        **{name: version(name) for name in packages},
    }


def measure(folder: Path) -> dict[str, Entry]:
    """Everything; takes about a minute and a half of one core.

    Args:
        folder: Empty; what is made there stays.
    """
    return batches(training.FORMER / "shards") | shards(folder / "build") | runs(folder / "runs")


def batches(source: Path) -> dict[str, Entry]:
    """The text of `python -m pipeline.data.show --json`, the same for any ranks and workers, and its tensors.

    Each loader reads all batches in turn; the command starts processes for one.
    """
    found: dict[str, Entry] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for sampler, words in SAMPLERS.items():
        place = f"data.shards={source} data.streams=2 data.window=4 train.batch_size=6"
        recipe = load_recipe(FinetuneRecipe, [], [*words.split(), *place.split()])
        for ranks, workers in LAYOUTS:
            for step, tensors in enumerate(_read(recipe, ranks, workers)):
                text = show.explain(recipe, step, tensors)
                name = f"batch {step} {sampler}"
                entry = _batch(text, tensors)
                if found.setdefault(name, entry) != entry:
                    raise AssertionError(f"{name}: {ranks} ranks with {workers} workers read another one")
    torch.set_num_threads(threads)
    return found


def _read(recipe: FinetuneRecipe, ranks: int, workers: int) -> list[dict[str, np.ndarray]]:
    """The first global batches: name -> [G, ...]."""
    parts = []
    for rank in range(ranks):
        with show.open_loader(recipe, rank, ranks, workers) as loader:
            made = loader.batches(0)
            parts.append([_arrays(next(made)) for _ in range(BATCHES)])
    return [
        {name: np.stack(shares, 1).reshape(-1, *shares[0].shape[1:])  # rank r holds r, r + R, ...
         for name, shares in ((name, [part[name] for part in of_ranks]) for name in show.TENSORS)}
        for of_ranks in zip(*parts, strict=True)
    ]  # fmt: skip


def _arrays(batch: Any) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name).numpy().copy() for name in show.TENSORS}


def _batch(text: dict[str, Any], tensors: dict[str, np.ndarray]) -> Entry:
    plan: dict[str, Any] = {key: value for key, value in text.items() if key != "tensors"}
    plan |= {name: text["tensors"][name] for name in ("position", "row", "valid")}
    drawn: list[float] = []
    without = json.loads(json.dumps(plan), parse_float=lambda said: drawn.append(float(said)))
    values = [np.array(drawn), *(tensors[name] for name in ("waveform", "fbank", "targets"))]
    return Entry(_sha(without), {"text": _sha(text)}, _hex(_size(array) for array in values))


def _size(values: np.ndarray) -> float:
    """Root mean square with weights, so that each value's place counts."""
    flat = values.astype(np.float64).ravel()
    return float(np.sqrt(np.mean((flat * (1 + np.arange(flat.size) % 101 / 101)) ** 2))) if flat.size else 0.0


def shards(folder: Path) -> dict[str, Entry]:
    """Every byte of a seeded build of all kinds of audio, good and bad, and of segments of some.

    Left out: forbidden.wav, which root may read and others may not, and vanishes.wav, which is to be deleted after it
    was listed.
    """
    sound = folder / "audio" / "sound"
    make_corpus(sound)
    for name in ("forbidden.wav", "vanishes.wav"):
        (sound / name).unlink()
    whole = catalogs.folder(folder / "audio", "train")
    rows = ["path,start,end,labels,split"]
    for number, name in enumerate(CODECS):
        for start, end in ((0.0, 0.5), (0.731, 1.9), (2.25, 3.5)):
            rows.append(f"sound/{name},{start},{end},{number % 7},{'eval' if number % 4 == 3 else 'train'}")
    (folder / "segments.csv").write_text("\n".join(rows) + "\n")
    cut = catalogs.table(folder / "audio", folder / "segments.csv", None, None)
    return {
        "shards of whole files": _built(whole, folder / "whole", SECONDS, 64),
        "shards of segments": _built(cut, folder / "cut", 1.25, 16),
    }


def _built(catalog: catalogs.Catalog, out: Path, seconds: float, per_shard: int) -> Entry:
    build(catalog, out, BuildOptions(AudioOptions(seconds=seconds), per_shard), 1, engine="inline")
    index = load_index(out).sort_by("key")
    # How damaged files end is the decoder's release's own.
    sound = [row for row in index.to_pylist() if not Path(row["source"]).name.startswith(("cut", "hole"))]
    numbers = []
    for row in sound:
        with (out / row["shard"]).open("rb") as file:
            file.seek(row["waveform_offset"])
            samples = np.load(file, allow_pickle=False).astype(np.float64)
        numbers += [row["seconds"], float(np.sqrt(np.mean(samples**2)))]
    keys = [[row["key"], row["source"], row["labels"]] for row in sound]
    return Entry(_sha(keys), digests(out), _hex(numbers), within=0.02)  # other coders, another sound


def runs(folder: Path) -> dict[str, Entry]:
    """Losses of every method, of resumed runs, and of former/'s runs that go on; see `training.py`."""
    folder.mkdir(parents=True)
    run_ranks(2, training.__file__, folder)
    found = {}
    for name, rows in json.loads((folder / "report.json").read_text()).items():
        losses = (row[key] for row in rows for key in ("loss", "grad_norm", "eval_loss") if key in row)
        columns = sorted({key for row in rows for key in row})
        found[name] = Entry(exact={key: _sha([row.get(key) for row in rows]) for key in columns}, numbers=_hex(losses))
    shutil.rmtree(folder)
    return found


def differences(kept: dict[str, Any], made: dict[str, Entry], here: dict[str, str]) -> dict[str, str]:
    """Name -> what differs from the kept file; empty: nothing.

    Args:
        kept: Content of hashes.json.
        made: Of this code.
        here: `machine()`.
    """
    same_machine = kept["machine"] == here
    found = {}
    for name in kept["entries"].keys() | made.keys():
        if name not in made or name not in kept["entries"]:
            found[name] = "is not there any more" if name not in made else "is new"
            continue
        before, now = Entry(**kept["entries"][name]), made[name]
        said = []
        if before.always != now.always:
            said.append("plan")
        if same_machine:
            said += sorted(file for file in before.exact.keys() | now.exact.keys()
                           if before.exact.get(file) != now.exact.get(file))  # fmt: skip
        if not _close(before.numbers, now.numbers, 0.0 if same_machine else before.within):
            said.append("numbers")
        if said:
            found[name] = ", ".join(said)
    return dict(sorted(found.items()))


def _close(before: str, now: str, relative: float) -> bool:
    one, two = (list(map(float.fromhex, text.split())) for text in (before, now))
    return len(one) == len(two) and all(math.isclose(*pair, rel_tol=relative) for pair in zip(one, two, strict=True))


def write(made: dict[str, Entry]) -> None:
    entries = {name: {key: value for key, value in asdict(entry).items() if value} for name, entry in made.items()}
    KEPT.write_text(json.dumps({"machine": machine(), "entries": entries}, indent=1) + "\n")


def _hex(numbers: Iterable[float]) -> str:
    return " ".join(float(number).hex() for number in numbers)


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
