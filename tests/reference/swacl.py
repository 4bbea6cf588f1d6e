"""Eq. 4a and SimCLR's NT-Xent, term by term."""

import torch


def contrast(wav: torch.Tensor, spec: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """O_wav^i among all O_spec^j; cosine with temperature, or the raw dot product."""
    terms = []
    for i in range(len(wav)):
        scores = []
        for j in range(len(spec)):
            score = torch.dot(wav[i], spec[j])
            if temperature is not None:
                score = score / (wav[i].norm() * spec[j].norm()) / temperature
            scores.append(score)
        terms.append(torch.log(torch.exp(scores[i]) / sum(torch.exp(score) for score in scores)))
    return -sum(terms) / len(terms)


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """Each view among all others but itself; the other view of its clip is the right one."""
    views = [*first, *second]
    terms = []
    for i, view in enumerate(views):
        scores = {}
        for j, other in enumerate(views):
            score = torch.dot(view, other)
            if temperature is not None:
                score = score / (view.norm() * other.norm()) / temperature
            if i != j:
                scores[j] = score
        right = scores[(i + len(first)) % len(views)]
        terms.append(torch.log(torch.exp(right) / sum(torch.exp(score) for score in scores.values())))
    return -sum(terms) / len(terms)
