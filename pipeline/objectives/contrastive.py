"""SWaCL: contrast between a clip's waveform and spectrogram over the global batch (Eq. 4a), and SimCLR's NT-Xent.

In: this rank's pooled representations [n, D] each, in order of rank. Out: a scalar whose gradient,
averaged over ranks, is that of the global loss.

How it scales: each rank gathers the G vectors (O(G D), no gradient through the collective), computes
the softmax rows of its own clips in chunks, gathers G row normalisers, and from them the exact
gradient columns of its own clips. No rank ever holds the G x G matrix, nothing is sent in
backward, and so no collective can be reordered by ZeRO's own. The same function serves gradient
accumulation (`pipeline.tasks`): it takes all of the rank's clips of the step at once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline import distributed
from pipeline.flow import full, without_autocast

Gather = Callable[[torch.Tensor], torch.Tensor]
CHUNK = 1024  # rows of the similarity matrix that exist at once


class _GlobalInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, gather: Gather, rank: int, paired: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of this rank's queries; saves d(global loss)/d(local) times the number of ranks.

        Query i belongs to key i. `paired`: queries and keys are the same vectors, one view's and then the other's; i
        belongs to i + n / 2 and is not compared with itself.
        """
        n = len(query)
        queries, keys = gather(query), gather(key)
        first, total = rank * n, len(queries)
        own = torch.arange(first, first + n, device=query.device)
        partner = own.roll(n // 2) if paired else own
        lse, positive, hit, grad_query = [], [], [], []
        for rows in _chunks(n):
            logits = query[rows] @ keys.T  # (rows, G)
            if paired:
                logits.scatter_(1, own[rows, None], -torch.inf)
            lse.append(logits.logsumexp(dim=1))
            positive.append(logits.gather(1, partner[rows, None])[:, 0])
            hit.append(logits.argmax(dim=1) == partner[rows])
            grad_query.append((logits - lse[-1][:, None]).exp() @ keys - keys[partner[rows]])
        normaliser = gather(torch.cat(lse))
        grad_key = -queries[partner]  # the positives' part: a key's partner is on the same rank
        every = torch.arange(total, device=query.device)
        for rows in _chunks(total):
            share = (queries[rows] @ key.T - normaliser[rows, None]).exp()
            if paired:
                share.masked_fill_(every[rows, None] == own, 0.0)
            grad_key += share.T @ queries[rows]
        # d(global loss) = 1 / G; times R because data parallelism averages gradients over ranks: 1 / n.
        ctx.save_for_backward(torch.cat(grad_query) / n, grad_key / n)
        loss = (torch.cat(lse) - torch.cat(positive)).mean()
        accuracy = torch.cat(hit).float().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_query, grad_key = ctx.saved_tensors
        return grads[0] * grad_query, grads[0] * grad_key, None, None, None


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]


def swacl_loss(
    wav: torch.Tensor,
    spec: torch.Tensor,
    gather: Gather = distributed.gather,
    rank: int | None = None,
    *,
    temperature: float | None,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4a on pooled representations: -log softmax of waveform i at spectrogram i over all spectrograms of all ranks.

    Args:
        wav: [n, D].
        spec: [n, D], row i of the same clip as `wav`'s.
        gather: All ranks' rows in rank order, without gradient: [n, ...] -> [R n, ...].
        rank: This rank; None: of the process group.
        temperature: L2-normalise and divide by it; None: the raw dot products of Eq. 4a.
        symmetric: Average with the spectrogram -> waveform direction.

    Returns:
        (loss, accuracy): float32 scalars, means over this rank's clips. The mean over ranks is the
        global value; the gradient is R times d(global loss)/d(local rows), so that the ranks'
        average is the global gradient, the remote softmax terms included.
    """
    rank = distributed.rank() if rank is None else rank
    with without_autocast(wav):
        wav, spec = full(wav), full(spec)
        if temperature is not None:
            wav, spec = _unit(wav) / temperature, _unit(spec)
        loss, accuracy = _GlobalInfoNCE.apply(wav, spec, gather, rank, False)
        if symmetric:
            back, back_accuracy = _GlobalInfoNCE.apply(spec, wav, gather, rank, False)
            loss, accuracy = (loss + back) / 2, (accuracy + back_accuracy) / 2
    return loss, accuracy


def nt_xent_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    gather: Gather = distributed.gather,
    rank: int | None = None,
    *,
    temperature: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NT-Xent (SimCLR, Chen et al. 2020): each of the 2 G views is to find the other view of its clip among 2 G - 1.

    Negatives are all other clips' views, of the same kind too; both directions are in it.

    Args:
        first: [n, D].
        second: [n, D], row i of the same clip as `first`'s.
        gather: As in `swacl_loss`.
        rank: As in `swacl_loss`.
        temperature: As in `swacl_loss`.

    Returns:
        As `swacl_loss`.
    """
    rank = distributed.rank() if rank is None else rank
    with without_autocast(first):
        views = torch.cat([full(first), full(second)])
        keys = views if temperature is None else _unit(views)
        queries = keys if temperature is None else keys / temperature
        loss, accuracy = _GlobalInfoNCE.apply(queries, keys, gather, rank, True)
    return loss, accuracy


def token_loss(
    wav: torch.Tensor, spec: torch.Tensor, *, temperature: float | None, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4a read with Eq. 7's indices: i and j are patches of one clip, and N their number.

    A waveform token is contrasted with the spectrogram tokens of its own clip, so neither the batch
    nor the ranks play a part.

    Args:
        wav: [B, N, D].
        spec: [B, N, D], the token of the same place in the grid.
        temperature: As in `swacl_loss`.
        symmetric: As in `swacl_loss`.

    Returns:
        (loss, accuracy): scalars, means over clips and tokens.
    """
    with without_autocast(wav):
        wav, spec = full(wav), full(spec)
        if temperature is not None:
            wav, spec = _unit(wav) / temperature, _unit(spec)
        logits = wav @ spec.transpose(1, 2)  # (B, N waveform tokens, N spectrogram tokens)
        own = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
        directions = [logits, logits.transpose(1, 2)] if symmetric else [logits]
        losses = [F.cross_entropy(rows.flatten(0, 1), own.flatten()) for rows in directions]
        hits = [(rows.detach().argmax(dim=-1) == own).float().mean() for rows in directions]
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=-1)
