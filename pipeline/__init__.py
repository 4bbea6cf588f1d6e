"""CRAFT: cross-representation pretraining and finetuning on audio waveforms and spectrograms.

    import pipeline as craft

    craft.build_shards("audio/", "shards", seconds=5)
    loader = craft.Loader("shards", batch_size=32)
    task = craft.task("pretrain/craft_mae", loader)
    model = craft.load("runs/craft-swab")

Each name is imported when it is first used: `import pipeline` loads neither torch nor DeepSpeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Model as Model
    from pipeline.api import build_shards as build_shards
    from pipeline.api import load as load
    from pipeline.api import task as task
    from pipeline.data.fbank import fbank as fbank
    from pipeline.data.loader import Loader as Loader
    from pipeline.engine.step import update_teacher as update_teacher
    from pipeline.errors import UserError as UserError
    from pipeline.flow import Batch as Batch

__version__ = "0.1.0"
_HOMES = {
    "Batch": "pipeline.flow",
    "Loader": "pipeline.data.loader",
    "Model": "pipeline.api",
    "UserError": "pipeline.errors",
    "build_shards": "pipeline.api",
    "fbank": "pipeline.data.fbank",
    "load": "pipeline.api",
    "task": "pipeline.api",
    "update_teacher": "pipeline.engine.step",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
