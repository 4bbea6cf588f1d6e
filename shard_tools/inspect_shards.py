"""Look into a directory of shards: what is in it, and how it sounds.

In: DIR or URL of finished shards. Out: tables on stdout, and one HTML file with plots, spectrograms and
players that needs no network. With KEY: that clip alone. All counts are exact; levels, clipping and
quiet are measured on --sample clips drawn with --seed (rules: shard_tools/survey.py).
Exit status: 0, or 2 where there are no readable shards or no such clip.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.storage import Location, location
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_file, user_path, write_text
from shard_tools.portrait import clip_page, whole_page
from shard_tools.survey import QUIET_DB, Sound, Survey, find, measure, survey

LISTED = 5  # classes at each end
BAR = 40  # characters


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = make.add_argument
    add("directory", type=partial(location, what="DIR"), metavar="DIR|URL",
        help="of the shards")  # fmt: skip
    add("key", nargs="?", metavar="KEY", help="look at this clip alone (default: at all)")
    add("--html", type=partial(user_path, what="--html"), default=Path("inspect.html"), metavar="FILE",
        help="the report (default: inspect.html)")  # fmt: skip
    add("--sample", type=int, default=1000, metavar="N", help="clips whose level is measured (default: 1000)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw of the sample (default: 0)")
    add("--examples", type=int, default=6, metavar="N", help="clips in the report to see and hear (default: 6)")
    return make


def main() -> int:
    """Parses, looks, reports."""
    args = parser().parse_args()
    for name in ("sample", "examples"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} is negative; give 0 or more")
    check_output_file(args.html, "--html")
    try:
        if args.key is not None:
            manifest = load_manifest(args.directory)
            sounds = find(args.directory, manifest, args.key)
            lines, page = list(clip_lines(manifest, sounds)), clip_page(args.directory, manifest, sounds)
        else:
            found = survey(args.directory, args.sample, args.seed, args.examples)
            lines, page = list(text(args.directory, found, args.seed)), whole_page(args.directory, found, args.seed)
    except (OSError, ValueError, KeyError) as error:  # a damaged index, json or tar
        raise UserError(f"{args.directory}: {error}; verify_shards.py says what is damaged") from error
    try:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, page.encode("utf-8", "replace").decode())  # the name of a directory may not be UTF-8
    except OSError as error:
        raise UserError(f"--html {args.html}: {error.strerror}; give another path") from error
    sys.stdout.write("\n".join([*lines, f"plots, spectrograms and sound: {args.html}"]) + "\n")
    return 0


def text(directory: Location, found: Survey, seed: int) -> Iterator[str]:
    """The report in words, a line each."""
    manifest = found.manifest
    audio = manifest.audio
    yield (
        f"{directory}: {manifest.dataset}, {len(manifest.labels)} classes, clips of {audio.seconds:g} s at "
        f"{audio.sample_rate} Hz, {manifest.fbank.mel_bins} mel bins, digest {manifest.digest[:12]}"
    )
    for name, split in manifest.splits.items():
        share = split.clips / split.listed if split.listed else 0.0
        yield f"\n{name}: {split.clips} of {split.listed} listed clips ({share:.1%}) in {split.shards} shards"
        yield (
            f"  {split.seconds / 3600:.2f} h of audio; {found.padded[name]} clips shorter than {audio.seconds:g} s, "
            f"{split.silent} digital silence"
        )
        yield from _classes(manifest, name)
        yield from (f"  {count} failed: {reason}" for reason, count in found.failures[name].most_common())
        edges = np.linspace(0, audio.seconds, 11)
        yield from _bars("seconds of audio", found.durations[name].reshape(10, -1).sum(axis=1), edges)
    if found.levels:
        yield from _levels(found, seed)


def _classes(manifest: Manifest, name: str) -> Iterator[str]:
    counts = np.array(manifest.splits[name].class_clips or [0])
    order = np.argsort(-counts, kind="stable")
    there = counts[counts > 0]
    if not len(there):
        return
    share = np.sort(there / there.sum())
    even = float(np.exp(-(share * np.log(share)).sum()) / len(counts))
    yield (
        f"  {len(there)} of {len(counts)} classes occur; clips a class: most {counts.max()}, median "
        f"{np.median(counts):g}, least {counts.min()}; balance {even:.2f} (exp of entropy / classes; 1: all alike)"
    )
    for what, numbers in (("most", order[:LISTED]), ("least", order[::-1][:LISTED])):
        yield f"  {what}: " + ", ".join(f"{manifest.labels[n].name} {counts[n]}" for n in numbers)


def _levels(found: Survey, seed: int) -> Iterator[str]:
    levels, total = found.levels, sum(split.clips for split in found.manifest.splits.values())
    rms, peak = np.array([level.rms for level in levels]), np.array([level.peak for level in levels])
    yield f"\nlevels of {len(levels)} of {total} clips, drawn with --seed {seed}:"
    yield (
        f"  rms dBFS: 5 % {np.percentile(rms, 5):.1f}, median {np.median(rms):.1f}, 95 % {np.percentile(rms, 95):.1f}; "
        f"peak: median {np.median(peak):.1f}"
    )
    yield f"  clipped: {np.mean([level.clipped for level in levels]):.1%} of the clips"
    yield (
        f"  quiet (below {QUIET_DB:g} dBFS): {np.mean([level.quiet for level in levels]):.1%} of the time; "
        f"{np.mean([level.quiet == 1 for level in levels]):.1%} of the clips all the time"
    )
    yield f"  decoders: {_shares(found.decoders)}; source rates: {_shares(found.rates)}"
    edges = np.linspace(-100, 0, 11)
    yield from _bars("rms, dBFS", np.histogram(rms, edges)[0], edges)


def _shares(counts: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{name} {count / counts.total():.1%}" for name, count in counts.most_common())


def _bars(title: str, counts: np.ndarray, edges: np.ndarray) -> Iterator[str]:
    yield f"  {title}:"
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        yield f"    {low:6g} to {high:<6g} {count:9d} {'#' * round(BAR * count / max(1, counts.max()))}".rstrip()


def clip_lines(manifest: Manifest, sounds: list[Sound]) -> Iterator[str]:
    """A clip in words."""
    for sound in sounds:
        level = measure(sound, manifest.audio.sample_rate)
        row = sound.row
        yield f"{row['split']}/{row['key']} in {row['shard']}, waveform at byte {row['waveform_offset']}"
        yield f"  labels: {', '.join(sound.about.label_names)}"
        yield (
            f"  rms {level.rms:.1f} dBFS, peak {level.peak:.1f} dBFS, {'clipped' if level.clipped else 'not clipped'}, "
            f"quiet {level.quiet:.1%} of the time"
        )
        yield from (f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sound.json.items())


if __name__ == "__main__":
    run_cli(main)
