"""Look into a directory of shards: what is in it, and how it sounds.

In: DIR or URL of finished shards. Out: tables on stdout, and the same in one HTML file with plots, spectrograms and
players that needs no network. With KEY: that clip alone. All counts are exact; levels, clipping and
quiet are measured on --sample clips drawn with --seed (rules: shard_tools/survey.py). With --ids-out: instead
a text file of the clips' ids (keys), one a line, sorted, which evaluate.py --ids takes.
Exit status: 0, or 2 where there are no readable shards or no such clip.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import numpy as np
import soundfile
import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from pipeline.data.fbank import fbank
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.storage import Location, location
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_file, user_path, write_text
from shard_tools.survey import FLOOR_DB, QUIET_DB, Level, Sound, Survey, find, ids, measure, survey

INK, BAR, PALE = "#1c2430", "#1f6f8b", "#c3ccd6"
NAMED_CLASSES = 60  # more than these are drawn as a curve, without names
LISTED = 5  # classes at each end
BAR_WIDTH = 40  # characters

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2430 }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; border-bottom: 1px solid #d7dce2; text-align: right } th { background: #f2f4f7 }
th:first-child, td:first-child { text-align: left } p.caption { color: #48525e; font-size: 14px }
img { max-width: 100%; display: block } audio { width: 100%; margin: .3em 0 }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax({{ width }}px, 1fr)); gap: 1.2em }
.clip { border: 1px solid #d7dce2; border-radius: 6px; padding: .8em; min-width: 0 }
.clip h3 { margin: 0; font-size: 15px; overflow-wrap: anywhere } .clip p { margin: .2em 0; font-size: 13.5px }
pre { background: #f2f4f7; padding: .8em; font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer }
</style></head><body><h1>{{ title }}</h1><p class="caption">{{ caption }}</p>
{% for table in tables %}<h2>{{ table.title }}</h2>
{% if table.long %}<details><summary>{{ table.rows|length }} rows</summary>{% endif %}
<table><thead><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% if table.long %}</details>{% endif %}
{% if table.picture %}<img src="{{ table.picture }}" alt="{{ table.title }}">{% endif %}
{% endfor %}{% if clips %}<h2>Clips</h2><div class="clips">{% for clip in clips %}<div class="clip">
<h3>{{ clip.title }}</h3><p>{{ clip.labels }}</p><p class="caption">{{ clip.level }}</p>
<img src="{{ clip.picture }}" alt="waveform and spectrogram of {{ clip.title }}">
<audio controls preload="none" src="{{ clip.sound }}"></audio>
<details><summary>json</summary><pre>{{ clip.json }}</pre></details>
</div>{% endfor %}</div>{% endif %}</body></html>
"""


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
    add("--ids-out", type=partial(user_path, what="--ids-out"), metavar="FILE",
        help="write the ids of the clips here, and no report (default: a report)")  # fmt: skip
    add("--split", metavar="NAME[,NAME]", help="of --ids-out: of these splits alone (default: all)")
    return make


def main() -> int:
    """Parses, looks, reports."""
    args = parser().parse_args()
    for name in ("sample", "examples"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} is negative; give 0 or more")
    if (args.key is not None and args.ids_out) or (args.split is not None and not args.ids_out):
        raise UserError("--ids-out and --split are for all clips of splits: --split needs --ids-out, KEY goes alone")
    option = "--ids-out" if args.ids_out else "--html"
    target = check_output_file(args.ids_out or args.html, option)
    try:
        if args.ids_out:
            keys = ids(args.directory, args.split.split(",") if args.split is not None else [])
            lines, drawn = [f"{len(keys)} ids"], "".join(f"{key}\n" for key in keys)
        elif args.key is not None:
            manifest = load_manifest(args.directory)
            sounds = find(args.directory, manifest, args.key)
            lines = list(clip_lines(sounds, manifest.audio.sample_rate))
            drawn = page(args.key, f"in {args.directory}", [], sounds, manifest)
        else:
            lines, drawn = report(args.directory, args.sample, args.seed, args.examples)
    except (OSError, ValueError, KeyError) as error:  # a damaged index, json or tar
        raise UserError(f"{args.directory}: {error}; verify_shards.py says what is damaged") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, drawn.encode("utf-8", "replace").decode())  # the name of a directory may not be UTF-8
    except OSError as error:
        raise UserError(f"{option} {target}: {error.strerror}; give another path") from error
    end = "written to" if args.ids_out else "plots, spectrograms and sound:"
    sys.stdout.write("\n".join([*lines, f"{end} {target}"]) + "\n")
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


def tables(found: Survey) -> list[dict[str, Any]]:
    """All that is known of a directory of shards.

    A table has a title, head and rows, perhaps a picture; a `long` one is folded on the page and left out of the text,
    one of `bars` is for the text alone.
    """
    manifest = found.manifest
    made = [_splits(found), *_classes(manifest)]
    for name, counts in found.durations.items():
        edges = np.linspace(0, manifest.audio.seconds, 11)
        made.append(_histogram(f"{name}: seconds of audio", counts.reshape(10, -1).sum(axis=1), edges))
    if any(found.failures.values()):
        rows = [[reason, name, n] for name, counts in found.failures.items() for reason, n in counts.most_common()]
        made.append({"title": "Failures by reason", "head": ["reason", "split", "clips"], "rows": rows})
    if found.levels:
        made += _levels(found)
    return made


def text(title: str, caption: str, made: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tables as lines, numbers under one another."""
    yield f"{title}; {caption}"
    for table in made:
        if table.get("long"):
            continue
        yield f"\n{table['title']}"
        cells = [[str(cell) for cell in row] for row in [table["head"], *table["rows"]]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            # Names and bars stand to the left, numbers to the right.
            fitted = [
                f"{cell:<{width}}" if place == 0 or not name else f"{cell:>{width}}"
                for place, (cell, width, name) in enumerate(zip(row, widths, table["head"], strict=True))
            ]
            yield f"  {'  '.join(fitted)}".rstrip()


def page(title: str, caption: str, made: Sequence[dict[str, Any]], sounds: Sequence[Sound], manifest: Manifest) -> str:
    """Tables and clips as HTML; a clip alone is shown large."""
    clips = [
        {
            "title": f"{sound.row['split']}/{sound.row['key']}",
            "labels": ", ".join(sound.about.label_names),
            "level": level_words(measure(sound, manifest.audio.sample_rate)),
            "picture": _clip_picture(sound, manifest),
            "sound": _uri("audio/wav", _wav(sound, manifest.audio.sample_rate)),
            "json": json.dumps(sound.json, indent=1, ensure_ascii=False),
        }
        for sound in sounds
    ]
    drawn = Environment(autoescape=True).from_string(PAGE)
    shown = [table for table in made if not table.get("bars")]
    return drawn.render(title=title, caption=caption, tables=shown, clips=clips, width=440 if made else 900)


def level_words(level: Level) -> str:
    """A clip's measures in words."""
    clipped = "clipped" if level.clipped else "not clipped"
    return f"rms {level.rms:.1f} dBFS, peak {level.peak:.1f} dBFS, {clipped}, quiet {level.quiet:.1%} of the time"


def _splits(found: Survey) -> dict[str, Any]:
    manifest, rows = found.manifest, []
    for name, split in manifest.splits.items():
        share = f"{split.clips / split.listed:.1%}" if split.listed else ""
        rows.append([name, split.clips, split.listed, share, split.shards, f"{split.seconds / 3600:.2f}",
                     found.padded[name], split.silent])  # fmt: skip
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots(1, len(manifest.splits), squeeze=False)[0]
    edges = np.linspace(0, manifest.audio.seconds, len(next(iter(found.durations.values()))) + 1)
    for axis, (name, counts) in zip(axes, found.durations.items(), strict=True):
        axis.stairs(counts, edges, fill=True, color=BAR)
        _style(axis, f"{name}: seconds of audio", "clips (log)")
        axis.set_yscale("symlog", linthresh=1)
    head = ["split", "clips", "listed", "found", "shards", "hours", "padded", "digital silence"]
    return {"title": "Splits", "head": head, "rows": rows, "picture": _png(figure)}


def _classes(manifest: Manifest) -> list[dict[str, Any]]:
    """How even the classes of each split are, and the clips of each class."""
    names = [label.name for label in manifest.labels]
    splits = {name: split for name, split in manifest.splits.items() if split.class_clips}
    columns: list[list[Any]] = []
    spread = []
    for name, split in splits.items():
        columns += [split.class_clips, split.class_listed or [""] * len(names)]
        counts = np.array(split.class_clips)
        order = np.argsort(-counts, kind="stable")
        share = np.sort(counts[counts > 0]) / max(1, counts.sum())
        even = np.exp(-(share * np.log(share)).sum()) / len(counts)
        ends = [", ".join(f"{names[n]} {counts[n]}" for n in some[:LISTED]) for some in (order, order[::-1])]
        spread.append([name, len(share), len(counts), *ends, f"{np.median(counts):g}", f"{even:.2f}"])
    head = ["class", *(f"{name} {what}" for name in splits for what in ("clips", "listed"))]
    rows = list(zip(names, *columns, strict=True))
    whole: dict[str, Any] = {"title": "Clips of each class", "head": head, "rows": rows, "long": True}
    if not splits:
        return [whole]
    head = ["split", "classes that occur", "of", "most clips", "fewest clips", "median", "balance"]
    title = "Classes (balance: exp of entropy / classes; 1: all alike)"
    return [{"title": title, "head": head, "rows": spread}, whole | {"picture": _class_picture(names, splits)}]


def _class_picture(names: list[str], splits: dict[str, Any]) -> str:
    """Clips by class, the most frequent first; what is listed but not there is pale."""
    named = len(names) <= NAMED_CLASSES
    figure = Figure(figsize=(10, 3.6 * len(splits)), layout="constrained")
    for axis, (title, split) in zip(figure.subplots(len(splits), 1, squeeze=False)[:, 0], splits.items(), strict=True):
        counts = np.array(split.class_clips)
        listed = np.array(split.class_listed or split.class_clips)
        order = np.argsort(-counts, kind="stable")
        places = np.arange(len(order))
        axis.bar(places, listed[order], width=0.85 if named else 1.0, color=PALE, label="listed")
        axis.bar(places, counts[order], width=0.85 if named else 1.0, color=BAR, label="in the shards")
        if named:
            shown = [names[number][:24] for number in order]
            axis.set_xticks(places, shown, rotation=60, ha="right", fontsize=7, parse_math=False)
        elif counts.max() > 20 * max(1, np.median(counts)):
            axis.set_yscale("symlog", linthresh=10)
        axis.margins(x=0.005)
        _style(axis, f"{title}: {'' if named else 'classes by rank'}".rstrip(": "), "clips")
        axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def _levels(found: Survey) -> list[dict[str, Any]]:
    levels = found.levels
    rms, peak, quiet = (np.array([getattr(level, name) for level in levels]) for name in ("rms", "peak", "quiet"))
    rows = [
        ["rms, dBFS: 5 %", f"{np.percentile(rms, 5):.1f}"],
        ["rms, dBFS: median", f"{np.median(rms):.1f}"],
        ["rms, dBFS: 95 %", f"{np.percentile(rms, 95):.1f}"],
        ["peak, dBFS: median", f"{np.median(peak):.1f}"],
        ["clipped clips", f"{np.mean([level.clipped for level in levels]):.1%}"],
        [f"quiet clips (all frames below {QUIET_DB:g} dBFS)", f"{np.mean(quiet == 1):.1%}"],
        ["quiet time", f"{np.mean(quiet):.1%}"],
    ]
    for what, counts in (("decoder", found.decoders), ("source rate", found.rates)):
        rows += [[f"{what} {name}", f"{count / len(levels):.1%}"] for name, count in counts.most_common()]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    columns = {"rms, dBFS": (rms, FLOOR_DB, 0), "peak, dBFS": (peak, FLOOR_DB, 0), "share of quiet time": (quiet, 0, 1)}
    for axis, (name, (values, low, high)) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        axis.hist(values, bins=40, range=(low, high), color=BAR)
        _style(axis, name, "clips")
    edges = np.linspace(FLOOR_DB, 0, 11)
    title = f"Levels of {len(levels)} clips"
    return [
        {"title": title, "head": ["", "value"], "rows": rows, "picture": _png(figure)},
        _histogram("rms, dBFS", np.histogram(rms, edges)[0], edges),
    ]


def _histogram(title: str, counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    rows = [
        [f"{low:g} to {high:g}", count, "#" * round(BAR_WIDTH * count / max(1, counts.max()))]
        for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    ]
    return {"title": title, "head": ["from, to", "clips", ""], "rows": rows, "bars": True}


def _clip_picture(sound: Sound, manifest: Manifest) -> str:
    rate, seconds = manifest.audio.sample_rate, manifest.audio.seconds
    waveform = sound.waveform.astype(np.float32) / 32768
    values = fbank(torch.from_numpy(waveform), rate, manifest.fbank.mel_bins).numpy()
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2]})
    # Largest and smallest of each column of pixels: no peak is lost, however long the clip is.
    size = max(1, len(waveform) // 1200)
    blocks = waveform[: len(waveform) // size * size].reshape(-1, size)
    times = (np.arange(len(blocks)) + 0.5) * size / rate
    above.fill_between(times, blocks.min(axis=1), blocks.max(axis=1), color=BAR, linewidth=0.4)
    limit = max(0.01, float(np.abs(waveform).max()) * 1.05)
    above.set_ylim(-limit, limit)
    _style(above, "", "sample")
    low = float(np.percentile(values, 2))
    below.imshow(values.T, origin="lower", aspect="auto", extent=(0, seconds, 0, manifest.fbank.mel_bins),
                 vmin=low, cmap="magma")  # fmt: skip
    _style(below, "seconds", "mel bin")
    return _png(figure)


def _style(axis: Any, below: str, left: str) -> None:
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.set_ylabel(left, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _wav(sound: Sound, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, sound.waveform, rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def _png(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return _uri("image/png", out.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    run_cli(main)
