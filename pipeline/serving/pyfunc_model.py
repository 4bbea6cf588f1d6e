"""The model as MLflow loads it: this file is the model's code, safetensors are its weights. No pickle.

In: a table with one of the columns `path`, `audio` (bytes of a file; base64 in JSON) or `samples` (floats
at `rate` Hz) filled in each row. Out: a table with `labels` and `scores`, the best first.

MLflow copies this file and the project's packages into the model and runs it to load the model.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.errors import UserError
from pipeline.serving.scorer import Scorer, load_scorer

SOURCES = ("path", "audio", "samples")


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
            ValueError: a row names no audio, or audio that cannot be read.
        """
        try:
            waveforms = [_waveform(self.scorer, row) for row in model_input.to_dict("records")]
        except UserError as error:
            raise ValueError(str(error)) from error  # the server answers with the text
        scores = self.scorer.probabilities(waveforms)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : int((params or {}).get("top", 5))]
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
        rate: Any = row.get("rate")
        return scorer.resample(np.asarray(value), float(rate if _filled(rate) else scorer.spec.sample_rate))
    return scorer.read(value)


def _filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and np.isnan(value)) and value is not pd.NA


mlflow.models.set_model(CraftModel())
