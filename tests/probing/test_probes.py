"""Probes against scikit-learn and plain loops; what chooses a setting is never what tests it."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from pipeline.errors import UserError
from pipeline.probing import features as feature_files
from pipeline.probing import probes
from pipeline.probing.features import Features, Part, mapped
from pipeline.probing.probes import GRIDS, TEMPERATURE, fit, moments, predict
from pipeline.probing.protocol import by_folds, by_seeds, judge

CPU = torch.device("cpu")
CLIPS, CLASSES, WIDTH = 240, 4, 6


def made(folder, single: bool = True, tokens: int = 0) -> Features:
    """Two pieces; layer 2 of "spec" tells the classes with noise, layer 1 and "wav" hardly do."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, CLIPS)
    targets = np.eye(CLASSES, dtype=np.uint8)[label]
    if not single:
        targets |= np.eye(CLASSES, dtype=np.uint8)[rng.integers(0, CLASSES, CLIPS)]
    centres = rng.normal(0, 1.2, (CLASSES, WIDTH))
    arrays = {"spec.2": targets @ centres + rng.normal(0, 1, (CLIPS, WIDTH)) + 7,
              "spec.1": rng.normal(0, 50, (CLIPS, WIDTH)), "wav.2": rng.normal(0, 1, (CLIPS, WIDTH))}  # fmt: skip
    if tokens:
        arrays = {name: rng.normal(0, 1, (CLIPS, tokens, 64)) for name in ("spec.2", "wav.2")}
        arrays["spec.2"][np.arange(CLIPS), rng.integers(0, tokens, CLIPS), :CLASSES] += 6 * targets  # one token tells
    files = []
    for number, piece in enumerate((slice(0, 100), slice(100, CLIPS))):
        files.append(folder / f"train-{number:06d}.safetensors")
        tensors = {name: torch.tensor(value[piece], dtype=torch.float32) for name, value in arrays.items()}
        save_file(tensors | {"rows": torch.arange(CLIPS)[piece], "targets": torch.tensor(targets[piece])}, files[-1])
    return mapped(files)


def parts(features: Features, stream: str = "spec", layers: tuple[int, ...] = (2,)) -> tuple[Part, Part]:
    order = np.random.default_rng(1).permutation(CLIPS)
    return tuple(Part(features, stream, layers, where, CPU) for where in (order[:160], order[160:]))


def values(part: Part) -> tuple[np.ndarray, np.ndarray]:
    x, y = part.rows(np.arange(len(part)))
    return x[:, 0].numpy().astype(np.float64), y.numpy()


def test_features_come_from_the_pieces_in_the_order_asked_for(tmp_path):
    features = made(tmp_path)
    where = np.array([200, 3, 99, 100, 3])
    each = [features.take("spec", [2], np.array([place]))[0] for place in where]
    assert torch.equal(features.take("spec", [2], where), torch.stack(each))
    both = features.take("both", [2], where)
    assert torch.equal(both[..., :WIDTH], features.take("spec", [2], where))
    assert torch.equal(both[..., WIDTH:], features.take("wav", [2], where))
    assert features.take("spec", [1, 2], where).shape == (5, 2, WIDTH)


def test_a_linear_probe_is_scikit_learns_logistic_regression(tmp_path):
    train, test = parts(made(tmp_path))
    decay = 1e-4
    model = fit("linear", train, decay, True, 0)
    x, y = values(train)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = deviation * WIDTH**0.5
    theirs = LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=10000).fit(
        (x - mean) / scale, y.argmax(1)
    )
    expected = theirs.predict_log_proba((values(test)[0] - mean) / scale)
    found = torch.from_numpy(predict(model, test)).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert (found.argmax(1) == values(test)[1].argmax(1)).mean() > 0.6


@pytest.mark.parametrize("probe", ["linear", "knn", "cgp"])
def test_features_that_do_not_stay_in_memory_give_the_same_probe(tmp_path, monkeypatch, probe):
    features = made(tmp_path, single=False)
    layers = (1, 2) if probe == "cgp" else (2,)
    train, test = parts(features, layers=layers)
    expected = predict(fit(probe, train, GRIDS[probe][1], False, 0), test)
    monkeypatch.setattr(feature_files, "CACHE_BYTES", 0)
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 4 * WIDTH * len(layers) * 23)
    train, test = parts(features, layers=layers)
    assert sum(1 for _ in train) == 7
    found = predict(fit(probe, train, GRIDS[probe][1], False, 0), test)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_neighbours_vote_with_their_cosine(tmp_path):
    train, test = parts(made(tmp_path))
    found = predict(fit("knn", train, 5, True, 0), test)
    (x, y), (asked, _) = values(train), values(test)
    mean = x.mean(axis=0)
    unit = [(one - mean) / np.linalg.norm(one - mean, axis=1, keepdims=True) for one in (x, asked)]
    for row, similar in zip(found, unit[1] @ unit[0].T, strict=True):
        near = np.argsort(-similar)[:5]
        weights = np.exp(similar[near] / TEMPERATURE)
        np.testing.assert_allclose(row, weights @ y[near] / weights.sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("probe", ["knn", "linear", "attentive"])
def test_features_that_are_not_finite_are_no_hits(monkeypatch, caplog, probe):
    """Zeros stand for them; scores of NaN would all be right, and one clip of the training would make them all NaN."""
    monkeypatch.setattr(probes, "FEWEST_STEPS", 6)
    monkeypatch.setattr(probes, "EPOCHS", 1)
    rng = np.random.default_rng(0)
    targets = torch.tensor(np.eye(CLASSES, dtype=np.uint8)[rng.integers(0, CLASSES, CLIPS)])
    x = torch.tensor(rng.normal(size=(CLIPS, 3, 64) if probe == "attentive" else (CLIPS, WIDTH)), dtype=torch.float16)
    (division,) = by_seeds(np.arange(160), np.arange(160, CLIPS), [0])

    def judged(value: float) -> float:
        broken = x.clone()
        broken[3, ..., 0], broken[170:200, ..., 1] = value, value
        whole = torch.where(broken.flatten(1).isfinite().all(dim=1).view(-1, *[1] * (x.ndim - 1)), broken, 0)
        found, zeros = (
            judge(Features([{"rows": torch.arange(CLIPS), "targets": targets, "spec.2": each}]), [division], probe,
                  "spec", [2], True, CPU) for each in (broken, whole)
        )  # fmt: skip
        assert found == zeros
        return found["value"]

    assert judged(np.nan) == judged(np.inf) < 0.6
    assert caplog.text.count("NaN or infinite") == 2  # once for the features of a checkpoint


def test_gates_find_the_layer_that_tells(tmp_path):
    train, _ = parts(made(tmp_path), layers=(1, 2))
    probe = fit("cgp", train, 1e-4, True, 0)
    gates = probe.gates.softmax(dim=0)
    assert gates[1] > 0.9
    assert gates.sum().item() == pytest.approx(1)


@pytest.mark.slow
def test_attention_finds_the_token_that_tells(tmp_path):
    train, test = parts(made(tmp_path, tokens=9))
    truth = values(test)[1].argmax(1)
    scores = predict(fit("attentive", train, 1e-3, True, 0), test)
    assert (scores.argmax(1) == truth).mean() > 0.8
    np.testing.assert_array_equal(scores, predict(fit("attentive", train, 1e-3, True, 0), test))  # seeded
    both, other = parts(made(tmp_path, tokens=9), "both")
    assert both.shape == (1, 18, 64)
    assert (predict(fit("attentive", both, 1e-3, True, 0), other).argmax(1) == truth).mean() > 0.7


def test_moments_are_those_of_numpy(tmp_path):
    train, _ = parts(made(tmp_path))
    mean, deviation = moments(train)
    x, _ = values(train)
    np.testing.assert_allclose(mean[0], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation[0], x.std(axis=0), rtol=1e-5)


def test_what_chooses_is_a_part_of_what_trains():
    folds = np.array([1, 1, 2, 2, 3, 3, 0])
    found = {division.name: division for division in by_folds(folds, [], 0)}
    assert list(found) == ["fold 1", "fold 2", "fold 3"]
    assert found["fold 3"].chosen_on.tolist() == [0, 1]  # the next fold, turning round
    assert found["fold 3"].train.tolist() == [0, 1, 2, 3, 6]
    divisions = [*found.values(), *by_folds(folds[:4], [2], 0), *by_seeds(np.arange(9), np.arange(9, 12), [0, 1])]
    for division in divisions:
        assert len(division.chosen_on) > 0
        assert set(division.chosen_on) < set(division.train)
        assert not set(division.test) & set(division.train)
    with pytest.raises(UserError, match=r"--folds 4: the clips have the folds \[1, 2, 3\]"):
        by_folds(folds, [4], 0)
    with pytest.raises(UserError, match="the clips have the folds none"):
        by_folds(np.zeros(9, int), [], 0)


@pytest.mark.parametrize("single", [True, False])
def test_a_setting_does_not_depend_on_the_clips_that_test_it(tmp_path, single):
    features = made(tmp_path, single)
    divisions = by_seeds(np.arange(160), np.arange(160, CLIPS), range(2))
    result = judge(features, divisions, "knn", "spec", [2], single, CPU)
    assert result["metric"] == ("accuracy" if single else "mAP")
    assert result["n"] == CLIPS - 160
    assert result["value"] == pytest.approx(np.mean([part["value"] for part in result["parts"]]))
    assert result["spread"] == pytest.approx(np.std([part["value"] for part in result["parts"]], ddof=1))
    assert result["interval"]["low"] < result["value"] < result["interval"]["high"]
    assert {part["chosen"] for part in result["parts"]} <= set(GRIDS["knn"])
    features.targets[160:] = features.targets[160:].roll(1, dims=0)
    other = judge(features, divisions, "knn", "spec", [2], single, CPU)
    assert other["value"] < result["value"]
    for one, two in zip(result["parts"], other["parts"], strict=True):
        assert (one["chosen"], one["on_held_out"]) == (two["chosen"], two["on_held_out"])
    assert judge(features, by_folds(np.arange(CLIPS) % 5 + 1, [2], 0), "linear", "spec", [2], single, CPU)[
        "spread"] is None  # fmt: skip
