"""Look into a directory of shards: what is in it, and how it sounds.

In: DIR or URL of finished shards. Out: tables on stdout, and one HTML file with plots, spectrograms and
players that needs no network. With KEY: that clip alone. All counts are exact; levels, clipping and
quiet are measured on --sample clips drawn with --seed (rules: shard_tools/survey.py).
Exit status: 0, or 2 where there are no readable shards or no such clip.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.data.manifest import load_manifest
from pipeline.data.storage import Location, location
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_file, user_path, write_text
from shard_tools.page import level_words, page, tables, text
from shard_tools.survey import Sound, find, measure, survey


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
            lines = list(clip_lines(sounds, manifest.audio.sample_rate))
            drawn = page(args.key, f"in {args.directory}", [], sounds, manifest)
        else:
            lines, drawn = report(args.directory, args.sample, args.seed, args.examples)
    except (OSError, ValueError, KeyError) as error:  # a damaged index, json or tar
        raise UserError(f"{args.directory}: {error}; verify_shards.py says what is damaged") from error
    try:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, drawn.encode("utf-8", "replace").decode())  # the name of a directory may not be UTF-8
    except OSError as error:
        raise UserError(f"--html {args.html}: {error.strerror}; give another path") from error
    sys.stdout.write("\n".join([*lines, f"plots, spectrograms and sound: {args.html}"]) + "\n")
    return 0


def report(directory: Location, sample: int, seed: int, examples: int) -> tuple[list[str], str]:
    """What there is to say of a directory of shards, as lines and as a page.

    Raises:
        UserError, OSError: as `survey`.
    """
    found = survey(directory, sample, seed, examples)
    manifest, made = found.manifest, tables(found)
    title = f"{manifest.dataset}: {directory}"
    caption = (
        f"{sum(split.clips for split in manifest.splits.values())} clips of {manifest.audio.seconds:g} s at "
        f"{manifest.audio.sample_rate} Hz, {manifest.fbank.mel_bins} mel bins, {len(manifest.labels)} classes, in "
        f"{len(manifest.shards)} shards; digest {manifest.digest[:12]}. Counts are exact; levels are those of "
        f"{len(found.levels)} clips drawn with seed {seed}."
    )
    return list(text(title, caption, made)), page(title, caption, made, found.sounds, manifest)


def clip_lines(sounds: list[Sound], rate: int) -> Iterator[str]:
    """Clips in words."""
    for sound in sounds:
        row = sound.row
        yield f"{row['split']}/{row['key']} in {row['shard']}, waveform at byte {row['waveform_offset']}"
        yield f"  labels: {', '.join(sound.about.label_names)}"
        yield f"  {level_words(measure(sound, rate))}"
        yield from (f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sound.json.items())


if __name__ == "__main__":
    run_cli(main)
