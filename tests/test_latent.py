"""craft_latent: its equations written out, one teacher pass for all views, a teacher that is the mean it says it is."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import PretrainConfig, PretrainRecipe
from pipeline.engine.job import Progress
from pipeline.engine.step import teacher_decay, update, update_teacher
from pipeline.model.weights import load_weights
from pipeline.recipes import load_recipe
from pipeline.runs import initialise
from tests.engine.test_loop import BATCH, Engine, job
from tests.reference import latent, masks, visible
from tests.test_dropping import double, equal
from tests.test_export import SPEC
from tests.test_methods import batch, finetune_task, pretrain_task

LATENT = "pretrain.method=craft_latent"
PURPOSES = ("", ".second", ".2")


def move(task, seed: int = 0) -> None:
    """As optimiser steps do: away from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in task.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def values(teacher) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in teacher.weights.items()}


@pytest.mark.parametrize(
    ("kinds", "decoder", "last", "views"),
    [(("random", "cluster"), "shared", 2, 3), (("time", "random"), "separate", 4, 1)],
)
def test_craft_latent_is_its_equations(kinds, decoder, last, views):
    """Masks, targets of a teacher with other weights, predictions of masked patches, and the utterance loss."""
    words = f"pretrain.drop=[{','.join(kinds)}] pretrain.drop_ratio=[0.5,0.6] pretrain.decoder={decoder}"
    words += f" pretrain.views={views} pretrain.target_blocks={last} pretrain.r_w=0.5 pretrain.r_u=0.3"
    task, clips = double(LATENT, *words.split())
    move(task)
    losses = task(clips)
    teacher = task.teacher.model
    maps, theirs = ({"spec": clips.fbank.transpose(1, 2), "wav": model.waveform_map(clips.waveform)}
                    for model in (task.model, teacher))  # fmt: skip
    heard = {side: [latent.heard(teacher, side, one) for one in theirs[side]] for side in maps}
    targets = {side: [latent.patch_targets(outputs, last) for outputs in heard[side]] for side in maps}
    whole = [latent.clip_target([targets[side][clip] for side in maps]) for clip in range(len(clips))]
    sides, utterances = {}, []
    for number, (side, kind, ratio) in enumerate(zip(maps, kinds, (0.5, 0.6), strict=True)):
        own = (task.decoders[0], number) if decoder == "shared" else (task.decoders[number], 0)
        errors = []
        for purpose in PURPOSES[:views]:
            splits = masks.split(0, f"drop.{side}{purpose}", clips.position.tolist(), (2, 4), kind, ratio, (1, 2))
            for clip, (seen, hidden) in enumerate(splits):
                encoded = visible.encode(task.model, side, maps[side][clip], seen)
                predicted = visible.decode(*own, encoded, seen, hidden)
                for row, patch in zip(predicted, hidden, strict=True):
                    errors.append(((row - targets[side][clip][patch]) ** 2).mean())
                utterances.append(((latent.summary(task.summary, encoded) - whole[clip]) ** 2).mean())
        sides[side] = sum(errors) / len(errors)
        spread = sum(latent.variance(outputs, last) for outputs in heard[side]) / len(clips)
        torch.testing.assert_close(losses.named[f"{side}_target_variance"], spread)
    utterance = sum(utterances) / len(utterances)
    total = sides["spec"] + 0.5 * sides["wav"] + 0.3 * utterance
    equal(losses.total, total, task)
    expected = {"loss": total, "utterance_mse": utterance, "spec_mse": sides["spec"], "wav_mse": sides["wav"]}
    for name, value in expected.items():
        torch.testing.assert_close(losses.named[name], value.detach(), rtol=1e-6, atol=1e-6)


def test_all_views_share_one_pass_of_the_teacher():
    """Its network runs once, under no gradient, on all patches of both streams; the student's once, on all views."""
    for views in (1, 6):
        task, seen = pretrain_task(LATENT, f"pretrain.views={views}"), []

        def see(_, args, seen=seen):
            seen.append((args[0], torch.is_grad_enabled()))

        for network in (task.teacher.model, task.model):
            network.encoder.register_forward_pre_hook(see)
        task(batch()).total.backward()
        (teachers, recorded), (students, _) = seen
        assert not recorded
        assert [stream.shape[1] for stream in teachers] == [2 + 8] * 2
        assert [stream.shape[1] for stream in students] == [2 + 1] * 2 * views
        for splits in task.hidden.splits(torch.arange(4), task.model.grids()).values():
            assert len({str(split.visible.tolist()) for split in splits}) == views


def test_the_teacher_learns_nothing_by_itself():
    task = pretrain_task(LATENT)
    before = values(task.teacher)
    heard = task.teacher(batch().fbank, batch().waveform, None)
    assert not any(output.requires_grad for outputs in heard.values() for output in outputs)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    task.train()
    task(batch()).total.backward()
    optimizer.step()
    assert not any(module.training for module in task.teacher.model.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in task.teacher.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in task.teacher.weights.items())
    assert {name.split(".")[0] for name in task.state_dict()} == {"model", "decoders", "summary"}
    assert before.keys() == dict(task.model.named_parameters()).keys()


def test_a_stream_that_leaves_early_is_heard_where_it_was():
    task = pretrain_task(LATENT, "model.wav_depth=2", "pretrain.target_blocks=3")
    heard = task.teacher(batch().fbank, batch().waveform, None)
    assert {name: len(outputs) for name, outputs in heard.items()} == {"spec": 3, "wav": 2}
    assert torch.isfinite(task(batch()).total)


def test_the_teacher_begins_with_the_weights_that_its_student_was_given(tmp_path):
    given, task = pretrain_task(LATENT), pretrain_task(LATENT)
    move(given)
    save_file(given.state_dict(), tmp_path / "first.safetensors")
    initialise(task, load_recipe(PretrainRecipe, [], [LATENT, f"model.init={tmp_path / 'first.safetensors'}"]), SPEC)
    assert all(torch.equal(weight, task.teacher.weights[name]) for name, weight in task.model.named_parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_teacher_is_the_exponential_mean(kind):
    """t <- d t + (1 - d) s in float32, of weights as the forward passes see them; bf16 rounds what computes alone."""
    task = pretrain_task(LATENT)
    expected = {name: weight.double() for name, weight in values(task.teacher).items()}
    task.to(kind)(batch())  # a forward pass tells it the precision
    for step, decay in enumerate((0.9998, 0.5, 0.0, 0.99)):
        move(task, step)
        update_teacher(task, decay)
        for name, weight in task.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    computing = dict(task.teacher.model.named_parameters())
    for name, weight in task.teacher.weights.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(computing[name], weight.to(kind))
    assert torch.isfinite(task(batch()).total)


def test_a_decay_that_bf16_could_not_count_moves_the_teacher():
    task = pretrain_task(LATENT).bfloat16()
    task(batch())
    move(task)
    update_teacher(task, 0.9998)
    before = values(task.teacher)
    update_teacher(task, 0.9998)
    moved = sum(int((weight != before[name]).sum()) for name, weight in task.teacher.weights.items())
    assert moved > 0.9 * sum(weight.numel() for weight in before.values())


def test_the_decay_rises_step_by_step_and_then_stays():
    config = PretrainConfig(method="craft_latent", teacher_decay=(0.9, 0.99), teacher_steps=10)
    assert [teacher_decay(config, step, 100) for step in (0, 5, 10, 50)] == pytest.approx([0.9, 0.945, 0.99, 0.99])
    whole = config.model_copy(update={"teacher_steps": 0})
    assert [teacher_decay(whole, step, 100) for step in (0, 50, 100)] == pytest.approx([0.9, 0.945, 0.99])


def test_a_skipped_step_leaves_the_teacher_alone(tmp_path, monkeypatch):
    """Of fp16's overflow; a step that was taken moves it once."""
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 0)
    task = pretrain_task(LATENT, "pretrain.teacher_decay=[0.5,0.5]")
    move(task)
    before = values(task.teacher)
    about = SimpleNamespace(**vars(job(tmp_path, 3)) | {"task": task})
    engine, progress = Engine(largest=0.0), Progress()
    update(engine, about, BATCH, progress, torch.tensor(1.0))
    assert progress.skipped == 1
    assert all(torch.equal(weight, before[name]) for name, weight in task.teacher.weights.items())
    engine.largest = math.inf
    update(engine, about, BATCH, progress, torch.tensor(1.0))
    student = dict(task.model.named_parameters())
    for name, weight in task.teacher.weights.items():
        torch.testing.assert_close(weight, (before[name] + student[name].detach()) / 2)


def test_a_collapse_is_logged():
    """A teacher that says the same of all patches, and predictions that are all alike."""
    task = pretrain_task(LATENT)
    alive = task(batch()).named
    assert all(value > 1e-5 for name, value in alive.items() if name.endswith("_variance"))
    with torch.no_grad():
        for tokens in (task.teacher.model.spec_tokens, task.teacher.model.wav_tokens):
            tokens.positions.zero_()
        task.teacher.model.spec_patch.proj.weight.zero_()
        task.decoders[0].pixels.weight.zero_()
    dead = task(batch()).named
    assert float(dead["spec_target_variance"]) < 1e-9 < float(dead["wav_target_variance"])
    assert dead["spec_prediction_variance"] == dead["wav_prediction_variance"] == 0


def test_the_teacher_s_own_file_is_finetuned_too(tmp_path):
    """`model.init` of a checkpoint's teacher.safetensors: everything but the heads."""
    task = pretrain_task(LATENT)
    move(task)
    update_teacher(task, 0.5)
    file = tmp_path / "teacher.safetensors"
    save_file({f"model.{name}": weight for name, weight in task.teacher.weights.items()}, file)
    tuned = finetune_task("finetune.method=swast")
    report = load_weights(tuned, file)
    assert report.dropped == []
    assert all(name.startswith("classifier.") for name in report.fresh)
    for name in report.loaded:
        assert torch.equal(tuned.state_dict()[name], task.teacher.weights[name.removeprefix("model.")])
