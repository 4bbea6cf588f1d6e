"""Batch arithmetic, ds.json against the recipe, and the learning rate."""

import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from pipeline.command_line import parse, read_deepspeed_config
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.job import Plateau
from pipeline.engine.loop import _say_beginning
from pipeline.engine.setup import Batches, _mark_not_finite, build_engine, reconcile
from pipeline.engine.step import learning_rate
from pipeline.errors import UserError
from pipeline.recipes import load_recipe


def world(ranks: int) -> World:
    return World(0, ranks, torch.device("cpu"))


def recipe(*words: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, [], list(words))


@pytest.mark.parametrize(
    ("ds", "words", "ranks", "expected"),
    [
        ({}, (), 2, Batches(180, 90, 1)),
        ({}, ("train.micro_batch=15",), 4, Batches(180, 15, 3)),
        ({"gradient_accumulation_steps": 3}, (), 4, Batches(180, 15, 3)),
        ({"train_micro_batch_size_per_gpu": 10, "train_batch_size": "auto"}, (), 6, Batches(180, 10, 3)),
        ({"train_batch_size": 180}, (), 1, Batches(180, 180, 1)),
    ],
)
def test_batch_arithmetic(ds, words, ranks, expected):
    resolved, batches = reconcile(ds, recipe(*words), world(ranks))
    assert batches == expected
    assert resolved["train_batch_size"] == ranks * expected.micro * expected.accumulation
    assert resolved["gradient_clipping"] == 0.0  # DeepSpeed's own default would clip at 1


@pytest.mark.parametrize(
    ("ds", "words", "ranks", "said"),
    [
        ({}, (), 8, "180 does not divide by 8 ranks; use a batch of 176 or 184, or 6 or 9 ranks"),
        ({"train_batch_size": 64}, (), 2, "train_batch_size = 64, but train.batch_size = 180"),
        ({"gradient_clipping": 1.0}, (), 2, "gradient_clipping = 1.0, but optim.clip = 0.0"),
        ({"zero_optimisation": {}}, (), 2, "unknown key 'zero_optimisation'"),
        ({"optimizer": {"type": "Adam"}}, (), 2, "'optimizer'"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, (), 2, "stage 1 or more: at 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, (), 2, "stage 3 or more: at 2"),
        ({"bfloat16": {"enabled": True}}, (), 2, "'bfloat16' is set there, but its name is bf16; rename it"),
        ({"managed_gradient_accumulation": False}, (), 2, "each micro-batch would be an update else"),
        ({"elasticity": {"enabled": True}}, (), 2, "'elasticity' is set there, but train.batch_size of the recipe"),
        ({"compression_training": {}}, (), 2, "'compression_training' is set there, but DeepSpeed no longer has it"),
        ({"data_efficiency": {"enabled": True}}, (), 2, "'data_efficiency' is set there, but data.* of the recipe"),
        ({"tensor_parallel": {"autotp_size": 2}}, (), 2, "'tensor_parallel' is set there, but ranks share the batch"),
        ({"dataloader_drop_last": True}, (), 2, "'dataloader_drop_last' is set there, but every batch of the loader"),
        ({"fp16": {"enabled": True}}, (), 2, "needs a GPU"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, (), 2,
         'zero_optimization.cpu_offload is offload_optimizer today; write "offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"cpu_offload_param": True}}, (), 2, "cpu_offload_param is offload_param today"),
        ({}, ("train.micro_batch=7",), 2, "90 clips a rank, which is not micro-batch 7"),
    ],
)
def test_contradictions_name_both_sides(ds, words, ranks, said):
    with pytest.raises(UserError) as error:
        reconcile(ds, recipe(*words), world(ranks))
    assert said in str(error.value)


def test_shipped_deepspeed_configs_are_accepted():
    for name in ("ds.json", "zero0.json", "zero1.json", "zero2.json", "zero3.json"):
        resolved, _ = reconcile(read_deepspeed_config(name), recipe(), world(2))
        assert resolved["bf16"]["enabled"] is False  # "auto" on a CPU
    with pytest.raises(UserError, match=r"nope\.json"):
        read_deepspeed_config("nope.json")


def test_learning_rates_of_the_paper():
    optim = recipe().optim
    plateau = Plateau()
    assert learning_rate(optim, 499, 10**6, 0.0, plateau) == pytest.approx(2.5e-4)
    assert learning_rate(optim, 5000, 10**6, 0.0, plateau) == 5e-4
    for metric in (0.1, 0.2, 0.200001, 0.200015, 0.2):  # patience 2: the third in a row without improvement cuts
        plateau.observe(metric, optim.patience, optim.threshold)
    assert learning_rate(optim, 5000, 10**6, 0.0, plateau) == 2.5e-4
    balanced = load_recipe(FinetuneRecipe).optim
    rates = [learning_rate(balanced, 0, 1, epoch, Plateau()) for epoch in (0, 9.9, 10, 15, 20)]
    assert rates == pytest.approx([5e-5, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6])


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        ({"zero_optimization": {"stage": 4}}, 'zero_optimization.stage = 4: give 0, 1, 2, 3 or "auto"'),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage = "2"'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = true"),
        ({"zero_optimization": None}, "zero_optimization = null: give a JSON object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, 'zero_optimization.offload_optimizer = "cpu"'),
        ({"train_batch_size": "8"}, 'train_batch_size = "8": give a number of 1 or more'),
        ({"train_batch_size": None}, "train_batch_size = null"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu = 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps = 1.5"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1"),
        ({"gradient_clipping": "none"}, 'gradient_clipping = "none"'),
        ({"steps_per_print": "10"}, 'steps_per_print = "10"'),
        ({"bf16": {"enabled": "false"}}, 'bf16.enabled = "false": give true, false or "auto"'),
        ({"fp16": {"enabled": None}}, "fp16.enabled = null"),
        ({"bf16": True}, "bf16 = true: give a JSON object"),
        ({"compile": {"enabled": "auto"}}, 'compile.enabled = "auto": give true or false'),
        ({"data_types": "fp32"}, 'data_types = "fp32"'),
        ({"communication_data_type": "fp64"}, 'communication_data_type = "fp64": give fp32, bf16 or fp16'),
        ({"communication_data_type": 5}, "communication_data_type = 5"),
        ({"gradient_allreduce_op": "max"}, 'gradient_allreduce_op = "max": give mean or sum'),
        # With these a gradient that is not finite made all weights NaN, and checkpoints of them, without a word.
        ({"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm = false: give true"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow = false: give true"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, 'torch_autocast.dtype = "fp16": give "bfloat16"'),
        ({"torch_autocast": True}, "torch_autocast = true: give a JSON object"),
    ],
)
def test_values_of_ds_json_are_checked_as_well_as_keys(ds, said):
    with pytest.raises(UserError, match=re.escape(f"ds.json: {said}")):
        reconcile(ds, recipe(), world(1))


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """JSON keeps the last one: a run would be at another ZeRO stage than the one that somebody reads."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "stage": 1}}')
    with pytest.raises(UserError, match=r"ds\.json: 'stage' is there twice; join the two"):
        read_deepspeed_config(str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"mics_shard_size": 2}},  # which it had once
         "DeepSpeed refuses it: DeepSpeedConfigError: MiCS"),
        ({"zero_optimization": {"reduce_bucket": 2}},
         "DeepSpeed refuses DeepSpeedZeroConfig.reduce_bucket = 2: Extra inputs"),
        # By an assertion, or what else Python raises.
        ({"wall_clock_breakdown": "yes"}, "DeepSpeed refuses it: TypeError: unsupported operand"),
        ({"timers": {"throughput": 3}}, "DeepSpeed refuses it: .*must be a mapping, not int"),
        ({"seq_parallel_communication_data_type": "x"},
         "DeepSpeed refuses it: ValueError: Invalid communication_data_type"),
        ({"compile": {"enabled": True, "backend": "inductr"}}, 'compile.backend = "inductr": give one of .*inductor'),
    ],
)
def test_what_deepspeed_refuses_is_one_line(monkeypatch, given, said):
    monkeypatch.setattr("deepspeed.initialize", lambda config, **_: [DeepSpeedConfig(config)])
    ds, _ = reconcile(given, recipe(), world(1))
    with pytest.raises(UserError, match=rf"^ds\.json: {said}.*$"):
        build_engine(torch.nn.Linear(2, 2), recipe(), ds)


def test_an_open_value_of_zero_is_one_that_is_not_there():
    """As in files for other trainers; DeepSpeed alone would take buckets of 5e8 elements, gigabytes of each GPU."""
    found = {"reduce_bucket_size": "auto", "overlap_comm": "auto", "stage3_prefetch_bucket_size": "auto", "stage": 2}
    expected = reconcile({"zero_optimization": {"stage": 2}}, recipe(), world(2))
    assert reconcile({"zero_optimization": found}, recipe(), world(2)) == expected


def test_bf16_that_a_card_emulates_is_not_chosen(monkeypatch):
    """A V100 or T4: torch can, many times slower."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    gpu = World(0, 1, torch.device("cuda", 0))
    assert not reconcile({"bf16": {"enabled": "auto"}}, recipe(), gpu)[0]["bf16"]["enabled"]
    assert reconcile({"bf16": {"enabled": True}}, recipe(), gpu)[0]["bf16"]["enabled"]


def test_the_flag_of_deepspeeds_own_pages_is_taken():
    words = ["--deepspeed", "--deepspeed_config", "zero0.json", "data.shards=x", "log.mlflow=false"]
    assert parse(PretrainRecipe, "", words).ds["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(("file", "stage"), [("ds.json", 1), ("bf16.json", 1), ("zero2.json", 2)])
def test_an_open_zero_stage_is_1(file, stage):
    for words in ((), ("train.micro_batch=15",)):
        zero = reconcile(read_deepspeed_config(file), recipe(*words), world(4))[0]["zero_optimization"]
        assert zero == {"stage": stage, "reduce_bucket_size": 25_000_000, "overlap_comm": True}
        assert reconcile({}, recipe(*words), world(4))[0]["zero_optimization"]["stage"] == 1


def test_the_timer_that_waits_for_the_gpu_is_off_unless_asked_for():
    off, asked = {"throughput": {"enabled": False}}, {"throughput": {"enabled": True}}
    assert reconcile({}, recipe(), world(1))[0]["timers"] == off
    assert reconcile({"timers": asked}, recipe(), world(1))[0]["timers"] == asked


def test_communication_overlaps_unless_ds_json_or_offload_says_otherwise():
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for zero, overlap in (({"stage": 1}, True), ({"stage": 2, "overlap_comm": False}, False), ({"stage": 0}, None),
                          (offload, None), ({"stage": 3}, None)):  # fmt: skip
        resolved = reconcile({"zero_optimization": zero}, recipe(), world(2))[0]["zero_optimization"]
        assert resolved.get("overlap_comm") is overlap, zero


def test_a_stepwise_rate_without_a_step_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    for words, said in (("optim.schedule=step",), True), (("optim.schedule=step", "optim.milestones=[5]"), False):
        settings = recipe("optim.warmup=0", *words)
        ds, batches = reconcile({}, settings, world(2))
        job = SimpleNamespace(ds=ds, batches=batches, recipe=settings, total_steps=9, task=torch.nn.Linear(2, 2))
        caplog.clear()
        _say_beginning(job, world(2), 0)
        assert ("optim.milestones is empty: the rate stays as it is" in caplog.text) is said


def test_stage_2_with_several_micro_batches_says_what_it_costs(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    settings = recipe("train.micro_batch=15", "optim.warmup=0")
    for stage, ranks, said in ((2, 4, True), (1, 4, False), (2, 1, False)):
        ds, batches = reconcile({"zero_optimization": {"stage": stage}}, settings, world(ranks))
        job = SimpleNamespace(ds=ds, batches=batches, recipe=settings, total_steps=9, task=torch.nn.Linear(1000, 1000))
        caplog.clear()
        _say_beginning(job, world(ranks), 0)
        assert (f"summed over ranks {batches.accumulation} times a step; stage 1" in caplog.text) is said


@pytest.mark.parametrize(("norm", "marked"), [(math.nan, -1), (math.inf, -1), (-math.inf, -1), (0.0, 0.0), (1.5, 1.5)])
def test_norms_that_are_not_finite_are_marked_as_deepspeed_marks_them(norm, marked):
    value = torch.tensor(norm)
    _mark_not_finite(value)
    assert value == marked
