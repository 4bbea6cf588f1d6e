"""Every setting of a run, typed, in the order in which data flows through it.

Out: a frozen, checked `PretrainRecipe` or `FinetuneRecipe`; `pipeline/recipes.py` reads one from files and words.

A default stands here and nowhere else: CRAFT-base on AudioSet, as the paper has it. YAML files
under configs/ hold only what differs. `ds.json` owns what DeepSpeed owns (ZeRO stage, precision,
offload); `pipeline.engine.setup` reconciles the two.

Each setting states its effect, and nothing else decides what a run directory may be used for again
(`pipeline.run_directory`), which finished folds and ablations count, and what an ablation's identity is made of:

    result    changes the numbers of the run; a run directory keeps it from its first checkpoint on
    course    changes them too, but only from here on: a run that goes on may be longer, or be evaluated more often
    neutral   where, how fast, what is kept and shown: no number of the run depends on it
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

Effect = Literal["result", "course", "neutral"]
PRECISIONS = ("fp32", "tf32", "bf16")  # of networks that only compute: see `pipeline.model.precision`


def result(default: Any, **about: Any) -> Any:
    """A setting that changes the numbers of a run; arguments as of pydantic's `Field`."""
    return _setting("result", default, about)


def course(default: Any, **about: Any) -> Any:
    """A setting that changes the numbers of a run from here on; likewise."""
    return _setting("course", default, about)


def neutral(default: Any, **about: Any) -> Any:
    """A setting that changes no number of a run; likewise."""
    return _setting("neutral", default, about)


def _setting(effect: Effect, default: Any, about: dict[str, Any]) -> Any:
    return Field(default, json_schema_extra={"effect": effect}, **about)


def _expand(text: str) -> str:
    """`~` and `~name` at the beginning are home directories: in `run.dir=~/x` no shell expands them."""
    if "\0" in text:
        raise ValueError("holds a NUL character; give a path")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise ValueError(f"{error} write the directory out") from error


# A local path, or a URL where the setting allows one; empty: the setting's own default.
UserPath = Annotated[str, AfterValidator(_expand)]


def _join(value: Any) -> Any:
    """A YAML list, `[a, b]` and `a,b` are the same names; anything else is as it was, for pydantic to refuse."""
    parts = value.strip("[] ").split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return value
    names = [part.strip(" '\"") for part in parts]
    if len(set(names)) < len(names):
        raise ValueError("names a split twice; name each once")
    return ",".join(names)


Drop = Literal["random", "cluster", "time", "frequency"]
Share = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Names of splits with commas between, which a name cannot hold.
SplitNames = Annotated[str, BeforeValidator(_join)]


class Section(BaseModel):
    """A group of settings; an unknown key, a wrong type or a number that is not finite is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """`true`, `yes` and `on` are no 1, which pydantic would make of them: one step, all clips mixed."""
        parts = value if isinstance(value, list | tuple) else [value]
        wanted = cls.model_fields[str(info.field_name)].annotation
        if wanted is not bool and any(isinstance(part, bool) for part in parts):
            raise ValueError("takes neither true nor false (nor yes, no, on, off); give its value")
        return value


class RunConfig(Section):
    """The run itself."""

    dir: UserPath = neutral("", description="run directory; empty: runs/<kind>-<name>")
    name: str = neutral("", description="run name in MLflow; empty: BatchSize-Pretrain-Finetune")
    seed: int = result(0, ge=0, lt=2**63, description="seed of weights, sample order, masks and augmentation")
    resume: Literal["auto", "never"] = neutral(
        "auto", description="auto: go on from the newest complete checkpoint of run.dir; never: refuse to"
    )
    timeout: float = neutral(1800.0, gt=0, description="seconds a collective may take before the run aborts")
    deterministic: bool = course(
        False, description="GPUs compute the same bits each time, for some of their speed; CPUs always do"
    )


class ShardSet(Section):
    """One of several sets of shards in `data.shards`; its path alone may stand for it."""

    path: UserPath = Field(min_length=1)
    weight: float | None = Field(None, ge=0)
    split: SplitNames = ""
    eval_split: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


Shards = Annotated[
    Annotated[UserPath, Tag("text")] | Annotated[tuple[ShardSet, ...], Tag("list")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "list"),  # an error is of the right one alone
]


class Phase(Section):
    """From this step on, the weights of the sets in `data.shards`."""

    step: int = Field(ge=1)
    weights: tuple[Annotated[float, Field(ge=0)], ...]


class DataConfig(Section):
    """Which clips, in which order."""

    shards: Shards = neutral(
        "", description="directory or URL that holds manifest.json; or several as [{path: A, weight: 3}, {path: B, "
        "weight: 1, split: train, eval_split: eval}]: shares of the draws (none: of the clips), splits other than below"
    )
    temperature: float = result(
        1.0, ge=0.05, description="several sets without weights: their shares are those of clips^(1/temperature)"
    )
    schedule: tuple[Phase, ...] = result(
        (), description="several sets: other weights from a step on, such as [{step: 10000, weights: [1, 1]}]"
    )
    train_split: SplitNames = result(
        "train", description="split to train on; of several, such as unbalanced,train, the clips of all, in that order"
    )
    eval_split: str = result("eval", description="split to evaluate on, where no fold is held out; empty: none")
    fold: int = result(0, ge=0, description="held-out fold: train on the others, evaluate on it; 0: none")
    frames: int = result(0, ge=0, description="T; 0: 102.4 a second, rounded up to 16 (1024 for 10 s)")
    seconds: tuple[Annotated[float, Field(gt=0)], ...] = result(
        (), description="lengths of input beside the shards' own, such as [1, 5]: a clip has the shortest that holds "
        "its audio, a batch clips of one length; empty: all are as long as the shards' clips"
    )
    mean: float | None = result(None, description="fbank mean; null: the manifest's, of the training split")
    std: float | None = result(None, gt=0, description="fbank deviation; null: the manifest's")
    fbank: Literal["auto", "stored", "online"] = result(
        "auto", description="auto: computed on the device where augmentation changes the waveform, else read"
    )
    sampler: Literal["shuffle", "balanced"] = result("shuffle", description="balanced: rare classes more often")
    replacement: bool = result(True, description="balanced: draw with replacement (SSAST) or without (PaSST)")
    epoch_clips: int = result(0, ge=0, description="balanced: clips drawn an epoch (PaSST: 100000); 0: n")
    streams: int = result(64, ge=1, description="S: streams of shards; halved where the clips do not fill S windows")
    window: int = result(2048, ge=1, description="clips of the shuffle window of one stream")
    workers: int = neutral(2, ge=0, description="reader processes per rank; 0: the training process reads")
    prefetch: int = neutral(4, ge=1, description="batches in flight per rank; at least one a worker")
    on_error: Literal["skip", "raise"] = neutral("skip", description="a corrupt sample is replaced, or ends the run")
    max_bad: int = neutral(1000, ge=0, description="corrupt samples of one epoch, over all ranks, that end the run")
    max_bad_share: float = neutral(
        0.05, ge=0, le=1, description="the same as a share of the epoch's clips; also of those that miss at the start"
    )
    cache: UserPath = neutral(
        "", description="of shards behind a URL, on the node; empty: CRAFT_CACHE, else ~/.cache/craft"
    )
    cache_gb: float = neutral(0.0, ge=0, description="most GB in the cache; 0: until its disk is nine tenths full")
    fetch_ahead: int = neutral(
        256, ge=0, description="shards behind a URL: batches whose shards are fetched in advance"
    )

    @property
    def sets(self) -> tuple[ShardSet, ...]:
        """The sets of shards, of which there may be one."""
        return (ShardSet(path=self.shards),) if isinstance(self.shards, str) else self.shards

    @property
    def shown(self) -> str:
        """`shards` in words."""
        if isinstance(self.shards, str):
            return self.shards
        words = ["" if one.weight is None else f" (weight {one.weight:g})" for one in self.shards]
        return ", ".join(one.path + word for one, word in zip(self.shards, words, strict=True))

    @model_validator(mode="after")
    def _mixture(self) -> "DataConfig":
        several = not isinstance(self.shards, str)
        sets = self.sets if several else ()
        if several and not sets:
            raise ValueError("shards names no set")
        weights = [one.weight for one in sets]
        if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
            raise ValueError("shards: give each set a weight, or none")
        named = [(one.path, one.split or self.train_split) for one in sets]
        for one in named:
            if named.count(one) > 1:
                raise ValueError(f"shards: {one[0]} is there twice; raise its weight")
        if not several and (self.schedule or self.temperature != 1):
            raise ValueError("schedule and temperature are for several sets of shards; list them in shards")
        if self.temperature != 1 and any(weight is not None for weight in weights):
            raise ValueError("temperature is for sets without weights; leave it, or the weights, out")
        if several and self.fold:
            raise ValueError("fold: several sets have no folds in common; give one set, or splits")
        if several and self.sampler == "balanced" and not self.replacement:
            raise ValueError("replacement=false is for one set of shards")
        if list(self.seconds) != sorted(set(self.seconds)):
            raise ValueError("seconds: the lengths must rise")
        if self.seconds and self.frames:
            raise ValueError("seconds: each length has its own T; leave frames out")
        if self.seconds and self.schedule:
            raise ValueError("seconds and schedule do not go together: leave one of them out")
        if self.seconds and not self.replacement:
            raise ValueError("replacement=false is for inputs of one length; leave seconds out")
        steps = [phase.step for phase in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError("schedule: its steps must rise")
        for mix in (weights if weights and weights[0] is not None else [1.0], *(p.weights for p in self.schedule)):
            if not any(mix):
                raise ValueError("all weights are 0")
        for phase in self.schedule:
            if len(phase.weights) != len(sets):
                raise ValueError(f"schedule: step {phase.step} has {len(phase.weights)} weights for {len(sets)} sets")
        return self


class AugmentConfig(Section):
    """Augmentation of training clips (PAPER_SPEC 5); all zero in pretraining."""

    mixup: float = result(0.0, ge=0, le=1, description="share of clips mixed with another one, on the waveform")
    mixup_alpha: float = result(10.0, gt=0, description="lambda ~ Beta(alpha, alpha)")
    partners: Literal["uniform", "sampler"] = result(
        "uniform", description="mixup's other clips; uniform: all equally often (SSAST, PSLA); sampler: as data.sampler"
    )
    freq_mask: int = result(0, ge=0, description="SpecAugment: widest masked band, in mel bins")
    time_mask: int = result(0, ge=0, description="SpecAugment: longest masked span, in frames")
    noise: float = result(
        0.0, ge=0, description="noise on the normalised fbank: uniform in [0, 1) times a level up to this (SSAST: 0.1)"
    )
    noise_snr: tuple[float, float] | None = result(
        None, description="white noise on the waveform, at a ratio drawn between these two, in dB; null: none"
    )
    roll: float = result(0.0, ge=0, description="circular time shift, at most this many seconds either way")
    mask_map: bool = result(False, description="SpecAugment on the MSAE map too: the same span and band as the fbank")

    @field_validator("noise_snr")
    @classmethod
    def _rising(cls, ratios: tuple[float, float] | None) -> tuple[float, float] | None:
        if ratios is not None and not -100 <= ratios[0] <= ratios[1] <= 100:
            raise ValueError("give the lowest and the highest ratio in dB, such as [10,30]")
        return ratios


class ModelConfig(Section):
    """The network (PAPER_SPEC 1-3)."""

    size: Literal["micro", "tiny", "small", "base", "large"] = result("base", description="width, depth and heads")
    init: UserPath = neutral(
        "", description="to start from: run directory, checkpoint file, export, weights of others, hf://OWNER/NAME; "
        "empty: random"
    )
    init_classifier: Literal["auto", "keep"] = result(
        "auto", description="of model.init; auto: kept where its labels are known to be the shards', else a fresh one; "
        "keep: they are the shards', though nothing says so"
    )
    init_grid: tuple[int, int] | None = result(
        None, description="patches of init along frequency and time, where weights of others do not say it"
    )
    patch: int = result(16, ge=1, description="patch side, mel bins = frames")
    stride: int = result(16, ge=1, description="patch stride; smaller than the patch: overlap (SSAST finetuning: 10)")
    positions: Literal["centre", "interpolated", "rotary"] = result(
        "centre", description="of time: learned, and of shorter inputs the centre of them (SSAST, AST) or all of them "
        "interpolated; rotary: turns of queries and keys, so distances alone count"
    )
    frontend: Literal["msae", "strided", "sinc"] = result(
        "msae", description="waveform to map; strided: convolutions at a fifth of MSAE's cost; sinc: learned bands"
    )
    wav_depth: int = result(
        0, ge=0, description="blocks that the waveform goes through; 0: all. One that fuses must be among them"
    )
    kernels: tuple[int, ...] = result((11, 51, 101), description="MSAE: convolution kernels, one per scale")
    kernel_strides: tuple[int, ...] = result((1, 5, 10), description="MSAE: strides of those convolutions")
    channels: tuple[int, ...] = result(
        (43, 43, 42), description="MSAE: channels per scale; they sum to the mel bins, or (32, 32, 32) to a lower "
        "grid; of another front end the sum alone counts"
    )
    activation: Literal["relu", "gelu", "none"] = result("relu", description="MSAE before pooling; none: literal Eq. 1")
    norm: Literal["unpadded", "group", "none"] = result(
        "unpadded", description="front end: GroupNorm after a convolution, over the audio or (group) the padded clip"
    )
    class_tokens: int = result(2, ge=1, le=2, description="before the patches; 2: cls and dist (AST), 1: cls (ViT)")
    block: Literal["pre", "post"] = result(
        "pre", description="LayerNorm before attention and MLP, and after the last block; post: after both, and before "
        "the first block, as in EAT"
    )
    input_norms: bool = result(
        False, description="a LayerNorm of the patches, and of the tokens before the first block, as in AudioMosaic"
    )
    shared_patch: bool = result(False, description="one patch embedding for both representations")
    modality_embedding: bool = result(False, description="add a learned vector per representation")
    drop_path: float = result(
        0.0, ge=0, lt=1, description="stochastic depth: share of clips that skip the last block, rising from 0 linearly"
    )
    checkpoint_activations: bool = neutral(False, description="recompute MSAE and blocks in backward to save memory")


class OptimConfig(Section):
    """Optimiser and learning rate."""

    name: Literal["adam", "adamw"] = result("adam", description="adam: L2 in the gradient, as SSAST")
    lr: float = result(5e-4, gt=0, description="peak learning rate")
    head_lr: float = result(1.0, gt=0, description="finetuning: the classifier's rate, times this (SSAST: 1)")
    betas: tuple[Beta, Beta] = result((0.95, 0.999), description="Adam's decay rates")
    weight_decay: float = result(5e-7, ge=0, description="L2 (adam) or decoupled (adamw) decay")
    decay: Literal["all", "matrices"] = result(
        "all", description="what weight_decay is of; matrices: not of biases, norms, positions and tokens, as in MAE"
    )
    clip: float = result(0.0, ge=0, description="largest gradient norm; 0: no clipping")
    warmup: int = result(1000, ge=0, description="steps of linear warm-up")
    schedule: Literal["plateau", "step", "cosine", "constant"] = result("plateau", description="after the warm-up")
    factor: float = result(0.5, gt=0, lt=1, description="plateau, step: the rate is multiplied by this")
    patience: int = result(2, ge=0, description="plateau: evaluations without improvement before a cut")
    threshold: float = result(1e-4, ge=0, description="plateau: least improvement, as a share of the best")
    layer_decay: float = result(
        1.0, gt=0, le=1, description="each block's rate is this share of the next one's; embeddings lowest; 1: off"
    )
    milestones: tuple[float, ...] = result((), description="step: epochs after which the rate is cut")


class TrainConfig(Section):
    """How long, and how large a batch."""

    batch_size: int = result(180, ge=1, description="G: clips of the global batch, over all ranks")
    micro_batch: int = neutral(0, ge=0, description="clips per rank and forward; 0: G / ranks, or ds.json's")
    epochs: float = course(10.0, gt=0, description="passes over the training split")
    steps: int = course(0, ge=0, description="optimiser steps; 0: from epochs")
    max_bad_steps: int = neutral(10, ge=1, description="non-finite steps in a row that end the run")


class EvalConfig(Section):
    """Held-out evaluation."""

    every: int = course(0, ge=0, description="steps between evaluations; 0: see every_clips, every_epochs")
    every_clips: int = course(96000, ge=0, description="training clips between evaluations; 0: off")
    every_epochs: float = course(0.0, ge=0, description="epochs between evaluations; 0: off")
    clips: int = course(0, ge=0, description="evaluate on the first this many held-out clips; 0: all")
    batch_size: int = course(0, ge=0, description="clips per step over all ranks; 0: train.batch_size")
    probe: UserPath = neutral(
        "", description="pretraining: labelled shards that its frozen features are probed on (kNN, linear); empty: off"
    )
    probe_clips: int = neutral(2000, ge=10, description="only the first this many clips of each split of eval.probe")
    probe_every: int = neutral(1, ge=1, description="evaluations from one probe to the next")


class CheckpointConfig(Section):
    """What is kept of the run."""

    every: int = neutral(0, ge=0, description="steps between checkpoints; 0: at every evaluation and the end")
    keep: int = neutral(2, ge=1, description="newest checkpoints that are kept")
    keep_best: int = neutral(
        1, ge=0, description="besides: best ones, by the watched metric, of those that were made at an evaluation"
    )
    keep_every: int = neutral(0, ge=0, description="checkpoints at multiples of this many steps are kept; 0: none")
    keep_at: tuple[float, ...] = neutral((), description="checkpoints at these shares of the run are made and kept")
    average: tuple[int, int] = result((0, 0), description="first and last epoch whose weights are averaged; 0, 0: off")
    ema: float = result(0.0, ge=0, lt=1, description="decay per step of an exponential average of weights; 0: off")
    ema_every: int = result(32, ge=1, description="steps between its updates, each with decay ema^ema_every")

    @field_validator("keep_at")
    @classmethod
    def _shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share <= 1 for share in shares):
            raise ValueError("give shares of the run above 0, at most 1, such as [0.25,0.5,0.75]")
        return shares

    @field_validator("average")
    @classmethod
    def _epochs(cls, epochs: tuple[int, int]) -> tuple[int, int]:
        if epochs != (0, 0) and not 1 <= epochs[0] <= epochs[1]:
            raise ValueError("give the first and the last epoch, counted from 1, such as [6,25]")
        return epochs

    @model_validator(mode="after")
    def _one_average(self) -> "CheckpointConfig":
        if self.ema and self.average != (0, 0):
            raise ValueError("ema and average are two ways to average weights; set average=[0,0] or ema=0")
        return self


class LogConfig(Section):
    """Records of progress."""

    every: int = neutral(10, ge=1, description="steps between lines of metrics.jsonl and MLflow")
    peak_tflops: float | None = neutral(
        0.0, ge=0, description="of a GPU's matmuls, for the MFU; 0: measured at the start; null: no MFU"
    )
    stragglers: int = neutral(100, ge=0, description="steps between reports of the slowest rank; 0: none")
    profile: tuple[int, int] = neutral(
        (0, 0), description="first and last step that torch's profiler records; 0, 0: off"
    )
    profile_flops: int = neutral(0, ge=0, description="step that DeepSpeed's FLOPS profiler reports; 0: off")
    mlflow: bool = neutral(True, description="track the run in MLflow")
    uri: str = neutral("", description="MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else sqlite beside run.dir")
    experiment: str = neutral("craft", description="MLflow experiment")
    finish_wait: float = neutral(30.0, ge=0, description="at the end: seconds to wait since the server last answered")
    system_every: float = neutral(
        30.0, ge=0, description="seconds between samples of each node's CPU, GPU, ...; 0: off"
    )
    tags: dict[str, str] = neutral({}, description="further tags of the MLflow run")
    pictures: int = neutral(
        4, ge=0, description="pretraining: evaluations that leave pictures of masked reconstructions"
    )
    model: bool = neutral(
        True, description="finetuning: the final model becomes an artifact that `mlflow models` serves"
    )
    register_as: str = neutral("", description="finetuning: name in MLflow's registry for the final model; empty: none")

    @field_validator("profile")
    @classmethod
    def _range(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps != (0, 0) and not 1 <= steps[0] <= steps[1]:
            raise ValueError("give the first and the last step, counted from 1, such as [10,12]")
        return steps


class PretrainConfig(Section):
    """Self-supervised objectives (PAPER_SPEC 4)."""

    method: Literal[
        "ssast", "wapt", "swapt", "swacl", "pswacl", "craft_mae", "craft_latent", "craft_mosaic", "audio_mosaic"
    ] = result(
        "pswacl",
        description="paper, Table 2; of visible patches: craft_mae rebuilds the others, craft_latent predicts what a "
        "teacher makes of them, the mosaics contrast two views",
    )  # fmt: skip
    mask_patches: int = result(400, ge=1, description="K of N = 512 patches; scaled where the grid is smaller")
    clusters: tuple[int, ...] = result((3, 4, 5), description="sides of the square clusters of masked patches")
    ssast_compat: bool = result(False, description="masks as SSAST's code draws them: biased, the first never masked")
    two_pass: bool = result(
        False, description="InfoNCE and reconstruction each with a mask and pass of its own (SSAST)"
    )
    r_g: float = result(10.0, ge=0, description="weight of the reconstruction (Eq. 2)")
    r_w: float = result(1.0, ge=0, description="weight of the waveform's masked-patch losses (Eq. 3)")
    r_cl: float = result(0.01, ge=0, description="weight of the contrastive loss (Eq. 4b)")
    contrast: Literal["cosine", "raw"] = result(
        "cosine", description="normalised with temperature, or Eq. 4a literally"
    )
    temperature: float = result(0.07, gt=0, description="of the cosine contrast")
    level: Literal["clip", "token"] = result(
        "clip", description="contrast clips of the global batch, or the patches within a clip (N of Eq. 7)"
    )
    projection: Literal["none", "mlp"] = result("none", description="head before the contrast")
    symmetric: bool = result(False, description="add the spectrogram -> waveform direction")
    negatives: Literal["other", "both"] = result(
        "other", description="of the contrast of clips: the other representation's vectors, or both's (NT-Xent)"
    )
    mask_waveform: bool = result(False, description="pswacl: mask the contrast's waveform tokens too")
    clean_spectrogram: bool = result(False, description="pswacl: contrast an extra unmasked spectrogram pass")
    softmax: Literal["paper", "ssast"] = result("paper", description="InfoNCE over targets (Eq. 7a) or predictions")
    drop: tuple[Drop, Drop] = result(
        ("random", "random"),
        description="craft_*, audio_mosaic: what the encoder never sees of spectrogram and waveform map, or of two "
        "views of the spectrogram: patches at random or in clusters, whole columns (time) or rows (frequency)",
    )
    drop_ratio: tuple[Share, Share] = result(
        (0.8, 0.8), description="the shares of them that are dropped; what stays is rounded down"
    )
    decoder: Literal["shared", "separate"] = result(
        "shared", description="craft_mae, craft_latent: one decoder for both representations, or one each"
    )
    decoder_width: int = result(
        0, ge=0, multiple_of=64, description="of the decoder; 0: two thirds of the encoder's (512 of base), of "
        "craft_latent one third (256)"
    )
    decoder_depth: int = result(
        0, ge=0, description="blocks of the decoder; 0: a third of the encoder's, at most 4, of craft_latent at most 2"
    )
    views: int = result(
        4, ge=1, description="craft_latent: visible parts of a clip, for one pass of the teacher (EAT: 16)"
    )
    target_blocks: int = result(
        0, ge=0, description="craft_latent: last blocks of the teacher whose mean output is predicted; 0: all"
    )
    r_u: float = result(
        192.0, ge=0, description="craft_latent: weight of the utterance loss, a mean (EAT: 1, of a sum over 192 views)"
    )
    teacher_decay: tuple[Share, Share] = result(
        (0.9998, 0.99999), description="craft_latent: the teacher's decay per step, first and last (EAT's)"
    )
    teacher_steps: int = result(
        0, ge=0, description="craft_latent: steps in which the decay goes from the first to the last; 0: the run's"
    )

    @field_validator("clusters")
    @classmethod
    def _sides(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if not sides or min(sides) < 1:
            raise ValueError("give one or more sides of 1 patch or more")
        return sides


class FinetuneConfig(Section):
    """Supervised finetuning (PAPER_SPEC 5)."""

    method: Literal["ast", "wast", "swast", "swab"] = result("swab", description="paper, Table 2")
    bottlenecks: int = result(64, ge=0, description="F: fusion bottleneck tokens (swab)")
    fusion_layer: int = result(-1, ge=-1, description="first fusing layer, 0-based; -1: a third of the depth (4 of 12)")
    head: Literal["concat", "mean_pool", "mean_logits"] = result("concat", description="swast, swab: how streams meet")
    pool: Literal["mean", "cls", "rows"] = result(
        "mean", description="mean of patch tokens (SSAST), of cls and dist (AST), or of each frequency row (ours)"
    )
    loss: Literal["auto", "bce", "ce"] = result(
        "auto", description="auto: ce where every clip has exactly one label (elsewhere it is refused), else bce"
    )
    label_smoothing: float = result(0.0, ge=0, lt=1, description="share of a target that is spread evenly: ce, bce")
    gamma_pos: float = result(0.0, ge=0, description="bce: focusing on a clip's labels that are missed (ASL)")
    gamma_neg: float = result(0.0, ge=0, description="bce: likewise on the others, that are taken for labels (ASL: 4)")
    margin: float = result(
        0.0, ge=0, lt=1, description="bce: the others' probabilities below it cost nothing (ASL: .05)"
    )
    pos_weight: float = result(
        0.0, ge=0, le=1, description="bce: a label weighs (clips without / clips with it) to this power; 0: 1"
    )
    mask_time: float = result(0.0, ge=0, lt=1, description="share of patch columns that training leaves out of a clip")
    mask_freq: float = result(0.0, ge=0, lt=1, description="share of patch rows that training leaves out of a clip")
    folds: Literal["all"] | tuple[int, ...] = result(
        (), description="cross-validation: all, or a list of folds, each held out in turn; empty: data.fold alone"
    )

    def loss_of(self, single_label: bool) -> Literal["bce", "ce"]:
        """The loss of clips that have exactly one label each, or any number; ce trains a softmax, bce sigmoids."""
        return ("ce" if single_label else "bce") if self.loss == "auto" else self.loss


class Recipe(Section):
    """What pretraining and finetuning have in common."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


class PretrainRecipe(Recipe):
    """CRAFT-base: 180-PSWaCL on AudioSet."""

    pretrain: PretrainConfig = PretrainConfig()


class FinetuneRecipe(Recipe):
    """CRAFT-base: SWaB on balanced AudioSet."""

    model: ModelConfig = ModelConfig(stride=10)
    augment: AugmentConfig = AugmentConfig(mixup=0.5, freq_mask=48, time_mask=192)
    optim: OptimConfig = OptimConfig(lr=5e-5, warmup=0, schedule="step", milestones=(10, 15, 20, 25))
    train: TrainConfig = TrainConfig(batch_size=12, epochs=25)
    eval: EvalConfig = EvalConfig(every_clips=0, every_epochs=1.0, batch_size=48)
    checkpoint: CheckpointConfig = CheckpointConfig(average=(6, 25))
    finetune: FinetuneConfig = FinetuneConfig()
