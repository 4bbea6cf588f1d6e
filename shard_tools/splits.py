"""Names that say "split" or "fold": of folders, which then are no classes, and of segments csvs."""

import logging
import re
from collections.abc import Sequence

from pipeline.data.storage import Location, join
from pipeline.errors import UserError

log = logging.getLogger(__name__)

SPLIT_NAMES = frozenset({
    "train", "training", "valid", "validation", "val", "dev", "devel", "development", "test", "testing", "eval",
    "evaluation", "traindata", "testdata", "train_set", "test_set", "trainset", "testset", "trainval", "heldout",
})  # fmt: skip
FOLD_NAME = re.compile(r"(fold|split)[ _-]?[0-9]+", re.IGNORECASE)


def split_of_segments(segments: Location) -> str:
    """The split that a segments csv's name tells: `eval` where a whole word of it says so, else `train`.

    Raises:
        UserError: the name says several, or another.
    """
    words = set(re.split(r"[^a-z]+", str(segments).rsplit("/", 1)[-1].lower()))
    known = {"eval": {"eval", "evaluation"}, "train": {"train", "training"}}
    said = [name for name, spelled in known.items() if words & spelled]
    other = sorted(words & (SPLIT_NAMES - {"eval", "evaluation", "train", "training"}))
    if len(said) > 1 or (other and not said):
        names = ", ".join(said + other)
        raise UserError(f"--segments {segments}: its name does not tell the split ({names}); give --split")
    if not said:
        log.warning("%s: its name tells no split; taken as train (--split NAME for another)", segments)
    return said[0] if said else "train"


def refuse_split_folders(root: Location, classes: Sequence[str], inner: Sequence[str]) -> None:
    """Looks for class folders that are splits or folds: as classes they would be nonsense.

    Args:
        root: The directory.
        classes: Folders in it.
        inner: Folders in those.

    Raises:
        UserError: there are some. `train` alone, beside other classes, is the vehicle.
    """
    for names, where in ((classes, ""), (inner, " in the class folders")):
        splits = [name for name in names if name.lower() in SPLIT_NAMES]
        folds = [name for name in names if FOLD_NAME.fullmatch(name)]
        only = len(names) == 1 and not where
        if len(splits) > 1 or (splits and (only or (not where and splits[0].lower() != "train"))):
            remedy = "write a table with the columns path,labels,split (--dataset csv)"
            if not where:
                remedy = f"give --audio-root {join(root, splits[0])} --split {splits[0].lower()}, and each in turn " \
                         f"with the same --out; or {remedy}"  # fmt: skip
            raise UserError(f"--audio-root {root}: folders{where} are named {', '.join(splits[:4])}, which are splits "
                            f"and no classes; {remedy}")  # fmt: skip
        if len(folds) > 1 or (folds and only):
            raise UserError(f"--audio-root {root}: folders{where} are named {', '.join(folds[:4])}, which are folds "
                            "and no classes; write a table with the columns path,labels,fold")  # fmt: skip
