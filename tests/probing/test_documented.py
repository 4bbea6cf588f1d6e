"""Every Python example of the README and of docs/ runs, as it stands, page by page."""

from unittest import mock

import numpy as np
import pytest
import soundfile

from pipeline.methods import PRETRAIN
from tests.test_docs import PAGES, blocks

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def home(shards, finetuned, tmp_path_factory):
    """What the examples name: recordings by class and by name, shards, a finetuned run."""
    folder, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    names = [f"audio/{label}/{number}.wav" for label in ("cat", "dog") for number in range(4)]
    for name in (*names, *(f"numbered/dog-{number}.wav" for number in range(8)), "dog.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, 0.1 * rng.normal(size=8000), 16000)
    (folder / "shards").symlink_to(shards)
    (folder / "runs").mkdir()
    (folder / "runs" / "craft-swab").symlink_to(finetuned)
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_examples_run(page, home, tmp_path, monkeypatch):
    for item in home.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    with mock.patch.dict(PRETRAIN):  # an example adds a row
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page.name}, example {number + 1}", "exec"), names)  # in turn, as a reader does
