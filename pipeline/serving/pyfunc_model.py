"""The model as MLflow loads it: this file is the model's code, safetensors are its weights. No pickle.

In: a table with one of the columns `path`, `audio` (bytes of a file; base64 in JSON) or `samples` (floats
at `rate` Hz) filled in each row. Out: a table with `labels` and `scores`, the best first.

MLflow copies this file and the project's packages into the model and runs it to load the model.
"""

from numbers import Integral
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.errors import UserError
from pipeline.serving.package import DEFAULT_TOP
from pipeline.serving.scorer import BATCH, Scorer, load_scorer, resample
from shard_tools.decode import MAX_RATE

SOURCES = ("path", "audio", "samples")
MARGIN = 1.0  # seconds of samples beyond a clip's length: the resampler looks ahead


class CraftModel(PythonModel):
    """Labels for audio."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads weights and formats."""
        weights = Path(context.artifacts["weights"])
        self.scorer = load_scorer(weights.parent, weights)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """The best `params["top"]` labels of each row.

        Raises:
            ValueError: a row names no audio, or audio that cannot be read; or "top" is no number of labels.
        """
        top = (params or {}).get("top", DEFAULT_TOP)
        if not isinstance(top, Integral) or top < 1:
            raise ValueError(f"params: top = {top!r:.100}; give a number of labels, 1 or more")
        rows = model_input.to_dict("records")
        scores = self.scorer.probabilities([])
        try:
            for start in range(0, len(rows), BATCH):  # the audio of one batch at a time is in memory
                waveforms = [_waveform(self.scorer, row) for row in rows[start : start + BATCH]]
                scores = np.concatenate([scores, self.scorer.probabilities(waveforms)])
        except UserError as error:
            raise ValueError(str(error)) from error  # the server answers with the text
        best = np.argsort(-scores, axis=1, kind="stable")[:, : int(top)]
        labels = np.array(self.scorer.labels)
        return pd.DataFrame(
            {
                "labels": [labels[row].tolist() for row in best],
                "scores": [score[row].astype(float).tolist() for score, row in zip(scores, best, strict=True)],
            }
        )


def _waveform(scorer: Scorer, row: dict[str, Any]) -> np.ndarray:
    given = [name for name in SOURCES if _filled(row.get(name))]
    if len(given) != 1:
        raise UserError(f"a row fills {given or 'none'} of {', '.join(SOURCES)}; fill one")
    value = row[given[0]]
    if given[0] == "samples":
        return _resampled(scorer, value, row.get("rate"))
    if not isinstance(value, str if given[0] == "path" else bytes):
        raise UserError(f"{given[0]}: {type(value).__name__}; path is text, and audio the bytes of a file")
    try:
        return scorer.read(value)
    except UserError as error:
        if given[0] == "audio" or error.__cause__ is None:
            raise
        # The decoder's reason may quote what a file holds that is no audio, which is not everybody's to read.
        raise UserError(f"{row['path']}: {str(error.__cause__).partition(':')[0]}") from error


def _resampled(scorer: Scorer, samples: Any, rate: Any) -> np.ndarray:
    """The part of the samples that is heard, at the model's rate."""
    try:
        hertz = float(rate) if _filled(rate) else float(scorer.spec.sample_rate)
        heard = samples[: int(min(hertz, MAX_RATE) * (scorer.seconds + MARGIN))]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"samples: {error}; give a list of floats, and its rate in Hz") from error
    return resample(heard, hertz, scorer.spec.sample_rate)


def _filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and np.isnan(value)) and value is not pd.NA


mlflow.models.set_model(CraftModel())
