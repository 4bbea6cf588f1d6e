"""Probes on frozen features: linear, attentive, CGP, kNN.

In: a `Part` to train on and one to score. Out: scores float32 [n, C], of which only the order counts.

- linear: one layer's features, standardised with the training part's mean and deviation and divided by sqrt(d), so
  that one grid of weight decays serves any d; logistic regression (softmax where each clip has one label) by L-BFGS.
- cgp: the same on a convex sum of layers, sum_l softmax(g)_l x_l, whose gates g are learned (BAT, convex gated probe).
- attentive: one learned query attends to all tokens (multi-head, D/64 heads), LayerNorm, Linear; AdamW.
- knn: cosine of centred features, votes weighted with exp(cos / .07) (Wu et al. 2018).

All in float32 on the device. L-BFGS starts from zero and is the same for any seed; the attentive probe's weights and
order come from its seed. Memory: a chunk of features (`features.py`), of kNN also a chunk's similarities.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from pipeline.engine.evaluation import finite
from pipeline.objectives.classification import classification_loss
from pipeline.probing.features import Part

Probe = Literal["linear", "attentive", "cgp", "knn"]
GRIDS: dict[str, tuple[float, ...]] = {  # what is chosen on the held-out part: weight decay, lr, weight decay, k
    "linear": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    "attentive": (3e-3, 1e-3, 3e-4),
    "cgp": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    "knn": (1, 5, 10, 20, 50, 200),
}
ITERATIONS = 100  # of L-BFGS
EPOCHS, FEWEST_STEPS, BATCH, DECAY = 20, 600, 64, 0.05  # of the attentive probe
TEMPERATURE = 0.07
HEAD = 64
ASKED = 256  # clips whose neighbours are sought at a time: their labels are 256 k C numbers
DEVIATION = 1e-6  # least one: a feature that never varies says nothing

Model = Callable[[torch.Tensor], torch.Tensor]


def fit(probe: Probe, train: Part, value: float, single_label: bool, seed: int) -> Model:
    """Trains a probe.

    Args:
        probe: Which.
        train: Clips to train on; of several layers only "cgp" takes more than one.
        value: Of the probe's row of `GRIDS`.
        single_label: Every clip has exactly one label.
        seed: Of the attentive probe.

    Returns:
        Features [m, layers, ...] -> scores [m, C].
    """
    if probe == "attentive":
        return _fit_attentive(train, value, single_label, seed)
    mean, deviation = moments(train)
    if probe == "knn":
        return _neighbours(train, mean, int(value))
    return _fit_layers(train, mean, deviation, value, single_label)


def predict(model: Model, part: Part) -> np.ndarray:
    """Scores float32 [n, C] of a part, in its order; all finite, as `evaluation.finite` has them."""
    with torch.no_grad():
        return finite(torch.cat([model(x).float().cpu() for x, _ in part]).numpy())


def moments(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each feature over clips, float32 [layers, d]."""
    total: torch.Tensor | float = 0.0
    square: torch.Tensor | float = 0.0
    for x, _ in part:
        total = total + x.double().sum(dim=0)
        square = square + x.double().square().sum(dim=0)
    mean = torch.as_tensor(total) / len(part)
    variance = (torch.as_tensor(square) / len(part) - mean.square()).clamp(min=0.0)
    return mean.float(), variance.sqrt().clamp(min=DEVIATION).float()


class LayerProbe(nn.Module):
    """Softmax-gated sum of standardised layers -> Linear; of one layer, a linear probe.

    Args:
        mean, deviation: [layers, d] of the training clips.
        classes: C.
    """

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.mean, self.scale = mean, 1 / (deviation * math.sqrt(mean.shape[1]))
        self.gates = nn.Parameter(torch.zeros(len(mean), device=mean.device))
        self.weight = nn.Parameter(torch.zeros(classes, mean.shape[1], device=mean.device))
        self.bias = nn.Parameter(torch.zeros(classes, device=mean.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[m, layers, d] -> [m, C]."""
        layers = (x - self.mean) * self.scale
        mixed = torch.einsum("l,mld->md", self.gates.softmax(dim=0), layers)
        return F.linear(mixed, self.weight, self.bias)


def _fit_layers(
    train: Part, mean: torch.Tensor, deviation: torch.Tensor, decay: float, single_label: bool
) -> LayerProbe:
    """Minimises mean loss + decay / 2 |W|^2; the whole part is one batch, chunk by chunk."""
    loss = "ce" if single_label else "bce"
    probe = LayerProbe(mean, deviation, next(iter(train))[1].shape[1])
    classes = probe.weight.shape[0]
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-6, tolerance_change=1e-9)  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = decay / 2 * probe.weight.square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        value = penalty.detach()
        for x, y in train:
            # BCE is a mean over classes: their sum, as if each class had a regression of its own.
            part = classification_loss(probe(x), y, loss) * (len(x) / len(train) * (1 if single_label else classes))
            part.backward()  # type: ignore[no-untyped-call]
            value = value + part.detach()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return probe


class AttentiveProbe(nn.Module):
    """One query over the tokens of a clip -> LayerNorm -> Linear.

    Args:
        width: D.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD), batch_first=True)
        self.out_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[m, 1, N, D] -> [m, C]."""
        tokens = self.norm(x[:, 0])
        out, _ = self.attention(self.query.expand(len(x), -1, -1), tokens, tokens, need_weights=False)
        logits: torch.Tensor = self.linear(self.out_norm(out[:, 0]))
        return logits


def _fit_attentive(train: Part, rate: float, single_label: bool, seed: int) -> AttentiveProbe:
    x, y = train.rows(np.arange(1))
    width = x.shape[-1]
    if width % max(1, width // HEAD):
        raise ValueError(f"width {width} does not divide into heads of about {HEAD}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(width, y.shape[1]).to(x.device)
    steps = -(-len(train) // BATCH)
    epochs = max(EPOCHS, -(-FEWEST_STEPS // steps))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    rng = np.random.default_rng([seed])
    for _ in range(epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(order), BATCH):
            x, y = train.rows(order[start : start + BATCH])
            optimizer.zero_grad()
            loss = classification_loss(probe(x), y, "ce" if single_label else "bce")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return probe.eval()


def _neighbours(train: Part, mean: torch.Tensor, k: int) -> Model:
    def vote(asked: torch.Tensor) -> torch.Tensor:
        near = torch.empty(len(asked), 0, device=asked.device)
        labels = torch.empty(len(asked), 0, 1, device=asked.device)
        for others, targets in train:
            found, at = (asked @ F.normalize((others - mean)[:, 0], dim=1).T).topk(min(k, len(others)), dim=1)
            labels = torch.cat([labels.expand(-1, -1, targets.shape[1]), targets[at]], dim=1)  # [m, k, C]
            near = torch.cat([near, found], dim=1)
            near, order = near.topk(min(k, near.shape[1]), dim=1)
            labels = labels.gather(1, order[..., None].expand(-1, -1, labels.shape[2]))
        return torch.einsum("mk,mkc->mc", (near / TEMPERATURE).softmax(dim=1), labels)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([vote(part) for part in torch.split(F.normalize((x - mean)[:, 0], dim=1), ASKED)])

    return model
