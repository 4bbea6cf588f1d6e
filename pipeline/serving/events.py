"""Scores of windows -> what was heard in a recording, and when.

In: `Heard`. Out: labels of a whole recording, or `Event`s; as text, JSON, CSV rows, or a label track of Audacity.

Where windows overlap, each stretch between two neighbouring window edges has the mean of the windows that
cover it; an event is a run of stretches whose score reaches the threshold. So its edges are `hop` exact, not
a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.manifest import Label

if TYPE_CHECKING:
    from pipeline.serving.listen import Heard  # torch: events are for --help too


@dataclass(frozen=True, slots=True)
class Event:
    """A sound from `start` to `end` seconds; `score` is the highest of its stretches."""

    start: float
    end: float
    label: Label
    score: float


def whole(heard: "Heard", labels: Sequence[Label], top: int) -> list[tuple[Label, float]]:
    """The best labels of a recording: mean probability over its windows, the highest first."""
    mean = heard.scores.mean(axis=0)
    best = np.argsort(-mean, kind="stable")[:top]
    return [(labels[i], float(mean[i])) for i in best]


def stretches(heard: "Heard", window: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges [m + 1] in seconds, and probabilities [m, C] between them: the mean of the windows over each."""
    ends = heard.ends(window)
    edges = np.unique(np.concatenate([heard.starts, ends]).round(6))
    # Both starts and ends ascend, so the windows over a stretch are neighbours.
    first = np.searchsorted(ends, edges[:-1] + 1e-6, side="right")
    last = np.searchsorted(heard.starts, edges[1:] - 1e-6, side="left")
    scores = np.zeros((len(first), heard.scores.shape[1]), np.float32)
    for stretch, (i, j) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        if i < j:  # a gap between windows (a hop longer than a clip) is covered by none: nothing was heard there
            scores[stretch] = heard.scores[i:j].mean(axis=0)
    return edges, scores


def events(heard: "Heard", labels: Sequence[Label], window: float, threshold: float) -> list[Event]:
    """Runs of stretches whose probability is `threshold` or more, by start, then by score."""
    edges, scores = stretches(heard, window)
    found = []
    for c in np.flatnonzero((scores >= threshold).any(axis=0)).tolist():
        on = np.concatenate([[False], scores[:, c] >= threshold, [False]])
        first, last = (np.flatnonzero(on[1:] & ~on[:-1]), np.flatnonzero(~on[1:] & on[:-1]))
        for i, j in zip(first, last, strict=True):
            found.append(Event(float(edges[i]), float(edges[j]), labels[c], float(scores[i:j, c].max())))
    return sorted(found, key=lambda event: (event.start, -event.score))


def clock(seconds: float) -> str:
    """h:mm:ss.s, without the hours where there are none."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"


def bar(score: float, width: int = 30) -> str:
    """A score as a bar."""
    return "#" * round(width * score)


def audacity(found: Sequence[Event]) -> str:
    """A label track: start, end and text, tabs between; File > Import > Labels reads it."""
    rows = ((e.start, e.end, " ".join(e.label.name.split()), e.score) for e in found)  # a tab would end the name
    return "".join(f"{start:.6f}\t{end:.6f}\t{name} {score:.2f}\n" for start, end, name, score in rows)
