"""Class-balanced sampling, written as one would say it: a loop over clips, in exact fractions."""

from fractions import Fraction


def clip_weights(clips: list[list[int]], classes: int) -> list[Fraction]:
    """A clip weighs the sum over its labels of 1000 / (its clips + 0.01); a bare one weighs as the commonest."""
    counts = [0] * classes
    for labels in clips:
        for label in labels:
            counts[label] += 1
    of_class = [Fraction(1000) / (count + Fraction(1, 100)) for count in counts]
    weights = []
    for labels in clips:
        weight = Fraction(0)
        for label in labels:
            weight += of_class[label]
        weights.append(weight if labels else min(of_class))
    return weights


def expected_draws(weights: list[Fraction], draws: int) -> list[Fraction]:
    """With replacement: draws times the clip's share of the weight."""
    return [draws * weight / sum(weights) for weight in weights]


def inclusion(weights: list[Fraction], draws: int) -> list[Fraction]:
    """Without: the chance of each clip, in proportion to its weight and at most 1; the chances sum to `draws`.

    Clips whose share would exceed one draw are taken for sure, and the others share what is left.
    """
    certain = [False] * len(weights)
    while True:
        left = draws - certain.count(True)
        rest = sum(weight for weight, taken in zip(weights, certain, strict=True) if not taken)
        chances = [
            Fraction(1) if taken else left * weight / rest for weight, taken in zip(weights, certain, strict=True)
        ]
        if max(chances) <= 1:
            return chances
        certain = [taken or chance > 1 for taken, chance in zip(certain, chances, strict=True)]
