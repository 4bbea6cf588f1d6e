"""A catalog -> a directory of shards: plan, write what is not there yet, index, manifest last.

In: a `Catalog` and options. Out: tars, `index.parquet`, `failures.jsonl`, `manifest.json`.

The plan is a pure function of the catalog and the options: a seeded permutation of each split's clips,
cut into shards of equal planned size. So a shard's bytes depend neither on workers nor on other
shards, and a build that was killed goes on with the shards that have no record yet. Memory is that
of the catalog; index rows pass through one shard at a time.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.data.fbank import FRAME_MS, HOP_MS, frame_count
from pipeline.data.manifest import FORMAT, INDEX_SCHEMA, VERSION, Manifest, load_index, load_manifest
from pipeline.errors import UserError
from shard_tools.catalogs import Catalog
from shard_tools.distribute import run
from shard_tools.write import AudioOptions, ShardPlan, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How the shards are cut.

    Attributes:
        audio: What is stored of a clip.
        clips_per_shard: Planned clips of a shard; those that fail leave it smaller.
        seed: Of the permutation that mixes classes over shards.
    """

    audio: AudioOptions
    clips_per_shard: int = 512
    seed: int = 0


@dataclass(slots=True)
class Summary:
    """What a build did.

    Attributes:
        manifest: Of the whole directory.
        failures: Reasons (up to the first colon) and how many listed clips each cost.
        silent: Stored clips that are digital silence.
    """

    manifest: Manifest
    failures: Counter[str]
    silent: int


def plan_split(catalog: Catalog, split: str, out: Path, options: BuildOptions) -> list[ShardPlan]:
    """The shards of one split, without a byte of audio read."""
    rows = catalog.clips.rows(split)
    order = rows[np.random.default_rng([options.seed]).permutation(len(rows))].tolist()
    size = options.clips_per_shard
    return [
        ShardPlan(
            split=split,
            number=start // size,
            clips=[catalog.clips[row] for row in order[start : start + size]],
            labels=catalog.labels,
            root=str(catalog.root),
            out=str(out),
            audio=options.audio,
        )
        for start in range(0, len(rows), size)
    ]


def build(catalog: Catalog, out: Path, options: BuildOptions, workers: int, overwrite: bool = False) -> Summary:
    """Builds all splits of the catalog into `out`, going on where an earlier attempt stopped.

    Splits that `out` already holds stay; a split built before with the same options is not built again.

    Raises:
        UserError: `out` holds shards of another format, vocabulary or options.
    """
    _check_keys(catalog)
    earlier = _earlier(catalog, out, options, overwrite)
    pending = [split for split in catalog.splits if earlier is None or split not in earlier.splits]
    plans: list[ShardPlan] = []
    for split in pending:
        _begin(catalog, split, out, options, overwrite)
        plans += plan_split(catalog, split, out, options)
    todo = [plan for plan in plans if not plan.record.exists()]
    total = sum(len(plan.clips) for plan in plans)
    done = total - sum(len(plan.clips) for plan in todo)
    with tqdm(total=total, initial=done, unit="clip", disable=not todo) as bar:
        for plan in run(todo, max(1, min(workers, len(todo)))):
            bar.update(len(plan.clips))
    return _finish(catalog, pending, plans, out, options, earlier)


def _finish(
    catalog: Catalog,
    pending: list[str],
    plans: list[ShardPlan],
    out: Path,
    options: BuildOptions,
    earlier: Manifest | None,
) -> Summary:
    """Index, failures and, last, the manifest; then the records are no longer needed."""
    audio = options.audio
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": catalog.dataset,
        "audio": {
            "sample_rate": audio.sample_rate,
            "seconds": audio.seconds,
            "samples": audio.samples,
            "encoding": "int16.npy",
        },
        "fbank": {
            "mel_bins": audio.mel_bins,
            "frames": frame_count(audio.samples, audio.sample_rate),
            "frame_ms": FRAME_MS,
            "hop_ms": HOP_MS,
            "encoding": "float16.npy",
        },
        "single_label": earlier is None or earlier.single_label,
        "labels": [label.model_dump() for label in catalog.labels],
        "splits": {} if earlier is None else earlier.model_dump()["splits"],
        "shards": [] if earlier is None else earlier.model_dump()["shards"],
        "options": {} if earlier is None else dict(earlier.options),
    }
    failures, silent = _index(catalog, pending, plans, out, content, earlier)
    content["options"] |= {split: _identity(catalog, split, options) for split in pending}
    content["index"] = _file_record(out / "index.parquet")
    content["failures"] = _file_record(out / "failures.jsonl")
    draft = Manifest.model_validate({**content, "digest": ""})
    manifest = draft.model_copy(update={"digest": draft.computed_digest()})
    _replace(out / "manifest.json", json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(out / ".build", ignore_errors=True)
    return Summary(manifest, failures, silent)


def _index(
    catalog: Catalog,
    pending: list[str],
    plans: list[ShardPlan],
    out: Path,
    content: dict[str, Any],
    earlier: Manifest | None,
) -> tuple[Counter[str], int]:
    """Writes index.parquet and failures.jsonl from the records, and fills in the manifest's totals."""
    reasons: Counter[str] = Counter()
    silent = 0
    totals = {split: np.zeros(3) for split in pending}
    seconds = dict.fromkeys(pending, 0.0)
    lines = _earlier_failures(out, pending) if earlier else []
    lines += [asdict(missing) for missing in catalog.missing if missing.split in pending]
    temporary = out / "index.parquet.tmp"
    with pq.ParquetWriter(temporary, INDEX_SCHEMA) as writer:
        if earlier is not None:
            writer.write_table(load_index(out))
        for plan in plans:
            rows, facts = read_record(plan.record)
            writer.write_table(rows)
            lines += facts["failures"]
            silent += facts["silent"]
            totals[plan.split] += facts["sums"]
            seconds[plan.split] += float(np.sum(rows["seconds"].to_numpy(), dtype=np.float64))
            content["single_label"] &= bool((np.diff(_offsets(rows)) == 1).all())
            if facts["clips"]:
                shard = {name: facts[name] for name in ("clips", "size", "sha256")}
                content["shards"].append({"name": plan.name, "split": plan.split, **shard})
    temporary.replace(out / "index.parquet")
    for line in lines:
        if line["split"] in pending:
            reasons[line["reason"].split(":")[0]] += 1
    _replace(out / "failures.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for split in pending:
        count, total, square = totals[split]
        mean = total / count if count else 0.0
        shards = [shard for shard in content["shards"] if shard["split"] == split]
        content["splits"][split] = {
            "clips": sum(shard["clips"] for shard in shards),
            "listed": catalog.listed(split),
            "shards": len(shards),
            "seconds": seconds[split],
            "fbank_mean": mean,
            "fbank_std": float(np.sqrt(max(square / count - mean**2, 1e-12))) if count else 1.0,
        }
    return reasons, silent


def _offsets(rows: Any) -> np.ndarray:
    column = rows["labels"].combine_chunks()
    return np.asarray(column.offsets)


def _identity(catalog: Catalog, split: str, options: BuildOptions) -> dict[str, Any]:
    """What must be equal for a build to be the same build."""
    lines = (
        f"{clip.key}\t{os.path.relpath(clip.path, catalog.root)}\t{clip.start}\t{clip.end}\t{clip.labels}\t{clip.fold}"
        for clip in catalog.clips
        if clip.split == split
    )
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return {
        "dataset": catalog.dataset,
        "clips_digest": digest.hexdigest(),
        "clips_per_shard": options.clips_per_shard,
        "seed": options.seed,
        **asdict(options.audio),
    }


def _earlier(catalog: Catalog, out: Path, options: BuildOptions, overwrite: bool) -> Manifest | None:
    """The finished shards that `out` holds already, checked to agree with the new ones."""
    if not (out / "manifest.json").exists():
        return None
    if overwrite:
        for file in _products(out):
            file.unlink()
        shutil.rmtree(out / ".build", ignore_errors=True)
        return None
    manifest = load_manifest(out)
    audio = options.audio
    wanted = {
        "--sample-rate": (manifest.audio.sample_rate, audio.sample_rate),
        "--seconds": (manifest.audio.seconds, audio.seconds),
        "--mel-bins": (manifest.fbank.mel_bins, audio.mel_bins),
        "label vocabulary": (_names(manifest.labels), _names(catalog.labels)),
    }
    for name, (old, new) in wanted.items():
        if old != new:
            raise UserError(f"{out}: holds shards with {name} {old}, not {new}; use another --out, or --overwrite")
    for split in catalog.splits:
        if split in manifest.splits:
            _compare(out, split, manifest.options.get(split, {}), _identity(catalog, split, options))
    return manifest


def _begin(catalog: Catalog, split: str, out: Path, options: BuildOptions, overwrite: bool) -> None:
    """Starts or resumes a split: its plan must be that of the unfinished attempt."""
    folder = out / ".build" / split
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    identity = _identity(catalog, split, options)
    if plan.exists():
        _compare(out, split, json.loads(plan.read_text(encoding="utf-8")), identity)
    else:
        _replace(plan, json.dumps(identity))
    for leftover in out.glob("*.tmp"):
        leftover.unlink()


def _compare(out: Path, split: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{out}: split '{split}' was begun with {name} = {old.get(name)}, not {value}; repeat that command, "
                "use another --out, or --overwrite"
            )


def _products(out: Path) -> Iterator[Path]:
    yield from out.glob("*.tar")
    for name in ("manifest.json", "index.parquet", "failures.jsonl"):
        if (out / name).exists():
            yield out / name


def _check_keys(catalog: Catalog) -> None:
    repeat = catalog.clips.repeat()
    if repeat is not None:
        one, other = repeat
        raise UserError(f"{one.path} and {other.path} get the same key '{one.key}'; give them a key column")


def _earlier_failures(out: Path, pending: list[str]) -> list[dict[str, str]]:
    text = (out / "failures.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["split"] not in pending]


def _names(labels: Any) -> list[str]:
    return [label.id for label in labels]


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
