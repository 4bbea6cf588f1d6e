"""FSD50K, as Zenodo has it.

| file below the root | what |
|---|---|
| FSD50K.ground_truth/dev.csv | fname,labels,mids,split: `train` or `val`; labels and mids separated by commas |
| FSD50K.ground_truth/eval.csv | fname,labels,mids: the split `eval` |
| FSD50K.ground_truth/vocabulary.csv | without a header: number, label, mid |
| FSD50K.dev_audio/, FSD50K.eval_audio/ | FNAME.wav |
"""

from collections.abc import Iterator

from pipeline.data.manifest import Label
from pipeline.data.storage import join
from shard_tools.catalogs import Catalog
from shard_tools.forms.entries import EVAL, TRAIN, Asked, Entry, Files, assemble
from shard_tools.tables import Table

TRUTH = "FSD50K.ground_truth"
MARK = f"{TRUTH}/dev.csv"


def read(asked: Asked) -> Catalog:
    """Its catalog.

    Raises:
        UserError: a table is missing or malformed, or no file is there.
    """
    vocabulary = Table(join(asked.root, f"{TRUTH}/vocabulary.csv"))
    labels: dict[int, Label] = {}
    for line, row in vocabulary.rows():
        if len(row) != 3:
            raise vocabulary.problem(line, f"{len(row)} cells, not number,label,mid", "get the file again")
        labels[vocabulary.integer(line, "number", row[0])] = Label(id=row[2].strip(), name=row[1].strip())
    audio = {"dev": Files(join(asked.root, "FSD50K.dev_audio")), "eval": Files(join(asked.root, "FSD50K.eval_audio"))}

    def entries() -> Iterator[Entry]:
        for part, files in audio.items():
            source = Table(join(asked.root, f"{TRUTH}/{part}.csv"))
            for line, (name, mids, split) in source.records(("fname", "mids"), ("split",)):
                own = EVAL if part == "eval" else split.strip() or TRAIN
                picked = [mid for mid in mids.split(",") if mid]
                yield Entry(name, labels=picked, split=own, line=line, table=source.path, **files.named(name))

    return assemble("fsd50k", asked, entries, [labels[number] for number in sorted(labels)], audio["dev"].report)
