"""Eq. 7 term by term, for one clip after the other."""

import math

import torch


def info_nce(predicted: torch.Tensor, target: torch.Tensor, softmax: str) -> torch.Tensor:
    """Eq. 7a, mean over clips: prediction c_i among the targets x_j ("paper"), or x_i among the c_j ("ssast")."""
    clips = []
    for c, x in zip(predicted, target, strict=True):
        terms = []
        for i in range(len(c)):
            if softmax == "paper":
                scores = [torch.dot(c[i], x[j]) for j in range(len(c))]
            else:
                scores = [torch.dot(c[j], x[i]) for j in range(len(c))]
            normaliser = sum(torch.exp(score) for score in scores)
            terms.append(torch.log(torch.exp(scores[i]) / normaliser))
        clips.append(-sum(terms) / len(terms))
    return sum(clips) / len(clips)


def accuracy(predicted: torch.Tensor, target: torch.Tensor, softmax: str) -> float:
    """Share of predictions whose best target is their own; SSAST compares probabilities over predictions."""
    hits = []
    for c, x in zip(predicted.detach(), target, strict=True):
        for i in range(len(c)):
            scores = [float(c[i] @ x[j]) for j in range(len(c))]
            if softmax == "ssast":
                sums = [sum(math.exp(float(c[k] @ x[j])) for k in range(len(c))) for j in range(len(c))]
                scores = [math.exp(score) / total for score, total in zip(scores, sums, strict=True)]
            hits.append(scores[i] == max(scores))
    return sum(hits) / len(hits)


def mse(reconstructed: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. 7b, also divided by a patch's values, as SSAST does."""
    clips = []
    for r, x in zip(reconstructed, target, strict=True):
        terms = [((r[i] - x[i]) ** 2).sum() / len(x[i]) for i in range(len(x))]
        clips.append(sum(terms) / len(terms))
    return sum(clips) / len(clips)


def patches(maps: torch.Tensor, side: int) -> torch.Tensor:
    """[B, M, T] -> [B, N, side^2], frequency-major: patch f * T' + t holds rows f, columns t."""
    clips = []
    for one in maps:
        cut = []
        for f in range(0, one.shape[0] - side + 1, side):
            for t in range(0, one.shape[1] - side + 1, side):
                cut.append(torch.stack([one[f + i, t + j] for i in range(side) for j in range(side)]))
        clips.append(torch.stack(cut))
    return torch.stack(clips)
