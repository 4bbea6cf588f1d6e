"""Every setting of every cell of the paper's tables against the paper's and SSAST's values, key by key.

The values stand here once more, written from the paper (Section 4, Appendix A) and from SSAST's `run_mask_patch.sh`,
`run_as.sh`, `run_esc_patch.sh`, `dataloader.py` and `ast_models.py`: no default or YAML file moves a table unnoticed.
"""

from typing import Any

import pytest

from pipeline.ablation.grid import Grid, Run
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.recipes import changes_result, flatten
from tests.conftest import ROOT

AUDIOSET = {"data.mean": -4.2677393, "data.std": 4.5689974}

COMMON = {
    # the input: 10 s, 128 mel bins, frames from the shards; each clip once an epoch, in an order of windows
    **AUDIOSET, "data.eval_split": "eval", "data.fold": 0, "data.frames": 0, "data.fbank": "auto",
    "data.sampler": "shuffle", "data.replacement": True, "data.epoch_clips": 0, "data.streams": 64, "data.window": 2048,
    "data.temperature": 1.0, "data.schedule": [], "data.seconds": [],
    # ViT-base, patches of 16 x 16; MSAE with kernels 11, 51, 101 and strides 1, 5, 10
    "model.size": "base", "model.init_grid": None, "model.init_classifier": "auto", "model.patch": 16,
    "model.kernels": (11, 51, 101), "model.kernel_strides": (1, 5, 10), "model.channels": (43, 43, 42),
    "model.activation": "relu", "model.norm": "unpadded", "model.shared_patch": False,
    "model.modality_embedding": False, "model.drop_path": 0.0,
    "model.positions": "centre", "model.frontend": "msae", "model.wav_depth": 0, "model.block": "pre",
    "model.class_tokens": 2, "model.input_norms": False,
    # Adam with L2 5e-7, betas .95 and .999, no clipping
    "optim.name": "adam", "optim.betas": (0.95, 0.999), "optim.weight_decay": 5e-7, "optim.decay": "all",
    "optim.clip": 0.0,
    "optim.layer_decay": 1.0, "optim.head_lr": 1.0, "optim.patience": 2, "optim.threshold": 1e-4,
    "augment.mixup_alpha": 10.0, "augment.partners": "uniform", "augment.noise_snr": None, "augment.mask_map": False,
    "train.steps": 0, "eval.every": 0, "eval.clips": 0, "run.seed": 0, "run.deterministic": False,
    "checkpoint.ema": 0.0, "checkpoint.ema_every": 32,
}  # fmt: skip

PRETRAIN = COMMON | {
    "data.train_split": "unbalanced,train", "model.stride": 16,
    # batch 180, rate 5e-4 after 1000 steps, halved where the masked accuracy stops rising; 10 epochs
    "train.batch_size": 180, "train.epochs": 10.0, "optim.lr": 5e-4, "optim.warmup": 1000, "optim.schedule": "plateau",
    "optim.factor": 0.5, "optim.milestones": (), "eval.every_clips": 96000, "eval.every_epochs": 0.0,
    "eval.batch_size": 0, "checkpoint.average": (0, 0),
    "augment.mixup": 0.0, "augment.freq_mask": 0, "augment.time_mask": 0, "augment.noise": 0.0, "augment.roll": 0.0,
    # 400 of 512 patches in squares of 3 to 5; r_g 10, r_w 1, r_cl .01
    "pretrain.method": "pswacl", "pretrain.mask_patches": 400, "pretrain.clusters": (3, 4, 5),
    "pretrain.ssast_compat": False, "pretrain.two_pass": False, "pretrain.softmax": "paper",
    "pretrain.r_g": 10.0, "pretrain.r_w": 1.0, "pretrain.r_cl": 0.01,
    "pretrain.contrast": "cosine", "pretrain.temperature": 0.07, "pretrain.level": "clip",
    "pretrain.projection": "none", "pretrain.symmetric": False, "pretrain.mask_waveform": False,
    "pretrain.clean_spectrogram": False,
    # of methods after the paper
    "pretrain.drop": ("random", "random"), "pretrain.drop_ratio": (0.8, 0.8), "pretrain.decoder": "shared",
    "pretrain.decoder_width": 0, "pretrain.decoder_depth": 0, "pretrain.negatives": "other",
    "pretrain.views": 4, "pretrain.target_blocks": 0, "pretrain.r_u": 192.0,
    "pretrain.teacher_decay": (0.9998, 0.99999), "pretrain.teacher_steps": 0,
}  # fmt: skip

SMALL_BATCH = {"train.batch_size": 24, "optim.lr": 1e-4}
SSAST = SMALL_BATCH | {"pretrain.method": "ssast", "pretrain.ssast_compat": True, "pretrain.two_pass": True,
                       "pretrain.softmax": "ssast"}  # fmt: skip
ONE_SCALE = {"model.kernels": (51,), "model.kernel_strides": (5,), "model.channels": (128,)}

FINETUNE = COMMON | {
    "data.train_split": "train", "model.stride": 10,
    # SSAST's balanced AudioSet: batch 12, rate 5e-5, halved at 10, 15, 20 (and 25, the end); mean of epochs 6 to 25
    "train.batch_size": 12, "train.epochs": 25.0, "optim.lr": 5e-5, "optim.warmup": 0, "optim.schedule": "step",
    "optim.factor": 0.5, "optim.milestones": (10, 15, 20, 25), "eval.every_clips": 0, "eval.every_epochs": 1.0,
    "eval.batch_size": 48, "checkpoint.average": (6, 25),
    "augment.mixup": 0.5, "augment.freq_mask": 48, "augment.time_mask": 192, "augment.noise": 0.0, "augment.roll": 0.0,
    # 64 bottleneck tokens from the fifth block on, means of patch tokens side by side
    "finetune.method": "swab", "finetune.bottlenecks": 64, "finetune.fusion_layer": -1, "finetune.head": "concat",
    "finetune.pool": "mean", "finetune.loss": "auto", "finetune.folds": (), "finetune.label_smoothing": 0.0,
    "finetune.gamma_pos": 0.0, "finetune.gamma_neg": 0.0, "finetune.margin": 0.0, "finetune.pos_weight": 0.0,
    "finetune.mask_time": 0.0, "finetune.mask_freq": 0.0,
}  # fmt: skip

COLUMNS = {
    "as_bal": {},
    "as_full": {
        "data.train_split": "unbalanced,train", "data.sampler": "balanced", "train.epochs": 5.0, "optim.lr": 1e-5,
        "optim.warmup": 1000, "optim.milestones": (2, 3, 4, 5), "checkpoint.average": (1, 5),
    },
    "esc50": {
        "data.mean": -6.6268077, "data.std": 5.358466, "train.batch_size": 48, "train.epochs": 50.0, "optim.lr": 1e-4,
        "optim.factor": 0.85, "optim.milestones": tuple(range(6, 50)), "checkpoint.average": (0, 0),
        # noise of the normalised fbank: rand x U(0, 1) / 10; a roll of 10 frames of 10 ms
        "augment.mixup": 0.0, "augment.freq_mask": 24, "augment.time_mask": 96,
        "augment.noise": 0.1, "augment.roll": 0.1,
    },
}  # fmt: skip

# Table and row -> (what differs in its pretraining, in its finetuning)
AST, SWAST, WAST = ({"finetune.method": name} for name in ("ast", "swast", "wast"))


def method(name: str) -> dict[str, Any]:
    return {"pretrain.method": name}


def raw(weight: float) -> dict[str, Any]:
    return {"pretrain.r_cl": weight, "pretrain.contrast": "raw"}


ROWS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "table1": {
        "24-SSAST-AST": (SSAST, AST), "180-SSAST-AST": (method("ssast"), AST), "SWaPT-AST": (method("swapt"), AST),
        "SWaPT-SWAST": (method("swapt"), SWAST), "SWaPT-SWaB": (method("swapt"), {}), "PSWaCL-AST": ({}, AST),
        "SSAST-SWaB": (method("ssast"), {}), "CRAFT": ({}, {}), "CRAFT, 3 runs together": ({}, {}),
    },
    "table3": {
        "180-SSAST-AST": (method("ssast"), AST), "180-SSAST-SWaB": (method("ssast"), {}),
        "SWaPT-AST": (method("swapt"), AST), "SWaPT-SWAST": (method("swapt"), SWAST),
        "SWaPT-SWaB": (method("swapt"), {}), "PSWaCL-AST": ({}, AST), "PSWaCL-SWaB": ({}, {}),
    },
    "table4": {
        "24-SSAST-AST": (SSAST, AST), "180-SSAST-AST": (method("ssast"), AST), "24-PSWaCL-AST": (SMALL_BATCH, AST),
        "24-PSWaCL-SWaB": (SMALL_BATCH, {}), "180-PSWaCL-AST": ({}, AST), "180-PSWaCL-SWaB": ({}, {}),
    },
    "table5a": {
        "SSAST": (SSAST, AST), "+ Larger batch": (method("ssast"), AST), "+ SWaCL": ({}, AST), "+ SWaB": ({}, {}),
    },
    "table5b": {"Single-scale": (ONE_SCALE, ONE_SCALE), "Multi-scale": ({}, {})},
    "table5c": {
        **{str(count): ({}, {"finetune.bottlenecks": count}) for count in (4, 16, 128)}, "64": ({}, {}),
    },
    "table5d": {**{str(layer): ({}, {"finetune.fusion_layer": layer}) for layer in (0, 8, 12)}, "4": ({}, {})},
    "table6": {
        "SSAST-AST": (method("ssast"), AST), "SSAST-SWaB": (method("ssast"), {}), "SWaCL-AST": (method("swacl"), AST),
        "SWaCL-SWaB": (method("swacl"), {}), "PSWaCL-AST": ({}, AST), "PSWaCL-SWaB": ({}, {}),
    },
    "table7": {
        "CRAFT-T": ({"model.size": "tiny"}, {"model.size": "tiny"}),
        "CRAFT-S": ({"model.size": "small"}, {"model.size": "small"}), "CRAFT-B": ({}, {}),
    },
    "table8": {"SSAST-AST": (SSAST, AST), "WaPT-AST": (method("wapt"), WAST), "PSWaCL-SWaB": ({}, {})},
    "figure2": {
        "180-SSAST-AST": (method("ssast"), AST), "SWaPT-SWaB": (method("swapt"), {}), "PSWaCL-AST": ({}, AST),
        "PSWaCL-SWaB": ({}, {}),
    },
    "r_cl": {
        "0.0001": ({"pretrain.r_cl": 1e-4}, {}), "0.01": ({}, {}), "1": ({"pretrain.r_cl": 1.0}, {}),
        "0.0001, dot products": (raw(1e-4), {}), "0.01, dot products": (raw(0.01), {}),
        "1, dot products": (raw(1.0), {}),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid([ROOT / "configs" / "ablation" / f"{name}.yaml" for name in sorted(ROWS)], "paper", {})


def settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flatten(run.recipe).items() if changes_result(key)}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def test_the_values_name_every_key_that_changes_a_result():
    for kind, values in ((PretrainRecipe, PRETRAIN), (FinetuneRecipe, FINETUNE)):
        assert set(values) == {key for key in flatten(kind()) if changes_result(key)}


def test_every_row_is_named(grid):
    found = {name: [row.name for row in table.rows if row.run] for name, table in grid.tables.items()}
    assert {name: sorted(rows) for name, rows in found.items()} == {name: sorted(rows) for name, rows in ROWS.items()}


def test_every_cell_is_the_papers(grid):
    for (table, row, column), runs in grid.cells.items():
        pretrain, finetune = ROWS[table][row]
        for run in runs:
            where = f"{table}: {row}: {column}"
            assert run.init is not None, where
            assert plain(settings(run.init)) == plain(PRETRAIN | pretrain), where
            own = {"run.seed": run.recipe.run.seed, "data.fold": run.recipe.data.fold}
            assert plain(settings(run)) == plain(FINETUNE | COLUMNS[column] | finetune | own), where
        folds = sorted({run.recipe.data.fold for run in runs})
        assert folds == ([1, 2, 3, 4, 5] if column == "esc50" else [0])
