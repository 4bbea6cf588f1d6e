"""A page to try a finetuned run: audio in; waveform, spectrogram and labels over time out.

In: a `Scorer`. Out: a gradio page that asks nobody but its own server for anything. Recordings longer than a
clip are heard in windows, up to ten minutes of them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.fbank import fbank
from pipeline.errors import UserError
from pipeline.serving.scorer import Scorer

LONGEST_SECONDS = 600.0
SHOWN = 8  # labels of the chart
COLUMNS = 2000  # of the pictures: more than a screen has
SHORTEST_HOP, LONGEST_HOP = 0.1, 10.0  # seconds between windows
MAX_UPLOAD = "1gb"
KEPT_SECONDS = 3600  # uploads and recordings: they are other people's, and would fill the disk
FRAME_SECONDS = 0.025  # of fbank: what is shorter has none

Answer = tuple[dict[str, float] | None, Any]


def answer(scorer: Scorer, path: str | None, hop: float) -> Answer:
    """Scores of the whole recording, the mean over its windows, and the picture; nothing of nothing.

    Args:
        scorer: The model.
        path: Audio file; None: the page was cleared.
        hop: Seconds between windows.

    Raises:
        UserError: it cannot be decoded, or the hop is outside its range.
    """
    if not path:
        return None, None
    if not SHORTEST_HOP <= hop <= LONGEST_HOP:  # the page's slider keeps to it, other clients of its server need not
        raise UserError(f"{hop} seconds between windows; give {SHORTEST_HOP:g} to {LONGEST_HOP:g}")
    waveform = scorer.read(path, LONGEST_SECONDS)
    starts, scores = scorer.over_time(waveform, hop)
    mean = scores.mean(axis=0)
    return dict(zip(scorer.labels, mean.tolist(), strict=True)), picture(scorer, waveform, starts, scores)


def picture(scorer: Scorer, waveform: np.ndarray, starts: np.ndarray, scores: np.ndarray) -> Any:
    """Waveform, spectrogram and the likeliest labels over time, above each other.

    Args:
        scorer: The model.
        waveform: float32 [n].
        starts: First second of each window [w].
        scores: Probabilities [w, C].

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    rate = scorer.spec.sample_rate
    seconds = len(waveform) / rate
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes: Any = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.5, 1.5])
    low, high = envelope(waveform)
    axes[0].fill_between(np.linspace(0, seconds, len(low)), low, high, color="#1f6f8b", linewidth=0.6)
    axes[0].set_ylabel("waveform")
    padded = np.pad(waveform, (0, max(0, round(FRAME_SECONDS * rate) - len(waveform))))
    features = fbank(torch.from_numpy(padded)[None], rate, scorer.spec.mel_bins)[0].numpy()
    features = features[:: max(1, len(features) // COLUMNS)]
    extent = (0.0, seconds, 0.0, float(features.shape[1]))
    axes[1].imshow(features.T, origin="lower", aspect="auto", cmap="magma", extent=extent)
    axes[1].set_ylabel("mel bin")
    best = np.argsort(-scores.max(axis=0), kind="stable")[:SHOWN]
    edges = np.append(starts, max(seconds, starts[-1] + 1e-3))
    image = axes[2].pcolormesh(edges, np.arange(len(best) + 1), scores[:, best].T, cmap="viridis", vmin=0, vmax=1)
    axes[2].set_yticks(np.arange(len(best)) + 0.5, [scorer.labels[i] for i in best], parse_math=False)
    axes[2].invert_yaxis()
    axes[2].set_xlabel(f"seconds; scores of windows of {scorer.seconds:g} s, drawn where they begin")
    axes[2].set_xlim(0, seconds)
    figure.colorbar(image, ax=axes[2], pad=0.01)
    return figure


def envelope(waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest sample of each of at most `COLUMNS` stretches."""
    size = -(-len(waveform) // COLUMNS)
    padded = np.pad(waveform, (0, -len(waveform) % size), mode="edge").reshape(-1, size)
    return padded.min(axis=1), padded.max(axis=1)


def build_page(scorer: Scorer, name: str) -> Any:
    """The page.

    Args:
        scorer: The model.
        name: Of the run, for the heading.

    Returns:
        A gradio.Blocks to launch.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError('the page needs gradio, an extra: pip install -e ".[demo]"') from error

    def heard(path: str | None, hop: float) -> Answer:
        try:
            return answer(scorer, path, hop)
        except UserError as error:
            reason = str(error).replace(str(path), Path(str(path)).name)  # not where the server put it
            raise gradio.Error(reason, print_exception=False) from error

    kept = (max(1, KEPT_SECONDS // 10), KEPT_SECONDS)  # looked through that often; all go when the server ends
    with gradio.Blocks(title=f"CRAFT: {name}", analytics_enabled=False, delete_cache=kept) as page:
        gradio.Markdown(
            f"# CRAFT\n`{name}`: {len(scorer.labels)} labels, heard in windows of {scorer.seconds:g} s; of a recording "
            f"at most {LONGEST_SECONDS / 60:g} minutes."
        )
        with gradio.Row():
            with gradio.Column(scale=1):
                audio = gradio.Audio(
                    sources=["upload", "microphone"], type="filepath", label="Audio", elem_id="audio",
                    buttons=["download"],  # its share button would send the audio to a stranger's server
                )  # fmt: skip
                hop = gradio.Slider(
                    SHORTEST_HOP, LONGEST_HOP, value=min(max(SHORTEST_HOP, scorer.seconds / 2), LONGEST_HOP),
                    label="Seconds between windows",
                )  # fmt: skip
                labels = gradio.Label(num_top_classes=5, label="Labels of the whole recording", elem_id="labels")
            with gradio.Column(scale=2):
                plot = gradio.Plot(show_label=False, elem_id="plot")
        gradio.on([audio.change, hop.release], heard, [audio, hop], [labels, plot], api_name="listen")
    return page
