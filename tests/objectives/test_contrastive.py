"""SWaCL against autograd on the whole matrix, with ranks simulated by a gather that is handed in."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.plan import LiveBytes
from pipeline.objectives import contrastive
from pipeline.objectives.contrastive import nt_xent_loss, swacl_loss, token_loss
from tests.reference.swacl import contrast, nt_xent


def sharded(query: torch.Tensor, key: torch.Tensor, ranks: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Runs each rank's part; the gather answers with what all ranks would send."""
    losses, query_grads, key_grads = [], [], []
    normaliser = (query @ key.T).logsumexp(dim=1)
    for rank in range(ranks):
        local_query = query.chunk(ranks)[rank].clone().requires_grad_()
        local_key = key.chunk(ranks)[rank].clone().requires_grad_()
        answers = iter([query, key, normaliser])
        gather = lambda _, answers=answers: next(answers)  # noqa: E731
        loss, _ = swacl_loss(local_query, local_key, gather, rank, temperature=None, symmetric=False)
        loss.backward()
        losses.append(loss.detach())
        query_grads.append(local_query.grad / ranks)  # data parallelism averages over ranks
        key_grads.append(local_key.grad / ranks)
    return losses, torch.cat(query_grads), torch.cat(key_grads)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_value_and_gradient_equal_the_whole_batch(ranks, chunk, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 12, 8, generator=generator)
    whole_query, whole_key = query.clone().requires_grad_(), key.clone().requires_grad_()
    expected = F.cross_entropy(whole_query @ whole_key.T, torch.arange(12))
    expected.backward()
    losses, query_grad, key_grad = sharded(query, key, ranks)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach())
    torch.testing.assert_close(query_grad, whole_query.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(key_grad, whole_key.grad, rtol=1e-5, atol=1e-6)


def pair(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.07])
@given(clips=st.integers(1, 6), width=st.integers(2, 5), seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_value_and_gradient_equal_the_equation(temperature, symmetric, clips, width, seed):
    views = pair(clips, width, seed=seed)
    fast, _ = swacl_loss(*views, lambda x: x, 0, temperature=temperature, symmetric=symmetric)
    slow = contrast(*views, temperature)
    if symmetric:
        slow = (slow + contrast(*views.flip(0), temperature)) / 2
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, views)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_nt_xent_and_its_gradient_equal_the_equation_on_any_ranks(ranks, chunk, temperature, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    views = pair(6, 4, seed=7)
    expected = nt_xent(*views, temperature)
    slow = torch.autograd.grad(expected, views)[0]
    # A rank's rows are its first views and then its second ones.
    parts = [torch.cat(part) for part in zip(*(view.detach().chunk(ranks) for view in views), strict=True)]
    keys = torch.cat(parts)
    keys, scale = (keys, 1.0) if temperature is None else (F.normalize(keys, dim=-1), temperature)
    queries = keys / scale
    normaliser = (queries @ keys.T).fill_diagonal_(-torch.inf).logsumexp(dim=1)
    losses, gradients = [], []
    for rank in range(ranks):
        own = pair(6, 4, seed=7).detach().chunk(ranks, dim=1)[rank].clone().requires_grad_()
        answers = iter([queries, keys, normaliser])
        loss, accuracy = nt_xent_loss(*own, lambda _, answers=answers: next(answers), rank, temperature=temperature)
        assert 0 <= accuracy <= 1
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, own)[0] / ranks)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients, dim=1), slow, rtol=1e-6, atol=1e-6)


@given(ranks=st.integers(1, 5), share=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_split_over_ranks_changes_nothing(ranks, share, seed):
    query, key = pair(ranks * share, 4, seed=seed).detach()
    whole = sharded(query, key, 1)
    split = sharded(query, key, ranks)
    torch.testing.assert_close(torch.stack(split[0]).mean(), whole[0][0])
    torch.testing.assert_close(split[1:], whole[1:])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_token_contrast_is_the_equation_within_each_clip(temperature, symmetric):
    views = pair(3, 5, 4, seed=4)
    fast, accuracy = token_loss(*views, temperature=temperature, symmetric=symmetric)
    directions = [views, views.flip(0)] if symmetric else [views]
    slow = sum(contrast(w, s, temperature) for wav, spec in directions for w, s in zip(wav, spec, strict=True))
    slow = slow / 3 / len(directions)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, views)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    assert 0 <= accuracy <= 1


def test_aligned_clips_score_perfectly():
    vectors = torch.eye(6)
    loss, accuracy = swacl_loss(vectors, vectors, lambda x: x, 0, temperature=0.01, symmetric=True)
    assert accuracy == 1.0
    assert loss < 1e-6


def test_bfloat16_input_is_contrasted_in_float32():
    wav, spec = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    loss, _ = swacl_loss(wav, spec, lambda x: x, 0, temperature=0.07, symmetric=False)
    exact, _ = swacl_loss(wav.float(), spec.float(), lambda x: x, 0, temperature=0.07, symmetric=False)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)


def peak_bytes(contrast, clips: int, ranks: int) -> int:
    """Most bytes of tensors that one rank holds at once in forward and backward, without its input."""
    query, key = torch.randn(2, clips, 32, generator=torch.Generator().manual_seed(5)).unbind()
    normaliser = (query @ key.T).logsumexp(dim=1)
    local = [part.chunk(ranks)[ranks - 1].clone().requires_grad_() for part in (query, key)]
    answers = iter([query, key, normaliser])
    with LiveBytes() as live:
        contrast(*local, lambda _: next(answers), ranks - 1).backward()
    return live.peak


@pytest.mark.parametrize("ranks", [1, 4])
def test_memory_grows_with_the_global_batch_and_not_with_its_square(ranks, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", 32)

    def whole(query, key, gather, rank):
        first = rank * len(query)
        return F.cross_entropy(query @ gather(key).T, torch.arange(first, first + len(query)))

    def chunked(query, key, gather, rank):
        return swacl_loss(query, key, gather, rank, temperature=None, symmetric=False)[0]

    small, large = (peak_bytes(chunked, clips, ranks) for clips in (1024, 4096))
    assert small < 12 * 1024 * 32 * 4  # a dozen times G x D floats: vectors, gradients, chunks
    assert large < 4.2 * small
    # The same measure sees the square where there is one.
    assert peak_bytes(whole, 4096, ranks) > 14 * peak_bytes(whole, 1024, ranks)
