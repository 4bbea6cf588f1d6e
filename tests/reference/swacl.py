"""Eq. 4a term by term."""

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
