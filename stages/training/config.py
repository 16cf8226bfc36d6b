"""Settings of a training run: dataclasses, YAML recipes, command-line overrides."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from ...cache.actions.history import ALONE, OFFSET, History, parse_offsets
from ...cache.actions.schemes import Frame, Scheme
from ...cache.actions.selection import Selection
from ...cache.loader.dropout import ConditionDropout
from ...cache.vlm.spec import LoraSpec
from ...common.config import (
    COUNT,
    DEVICE,
    SHARE,
    THREADS,
    Option,
    apply,
    from_document,
    from_mapping,
    load_shipped,
    require,
    require_ranges,
    shipped,
)
from ...common.documents import Form, read_json, require_form
from ...drifting.config import ONE_STEP, LossConfig
from ...errors import UserError, unknown

TRACKERS = ("wandb", "tensorboard", "trackio")
# Where neither command line nor recipe gives them, on CUDA; elsewhere they are as below.
ON_CUDA: dict[str, Any] = {"batch_size": 256, "threads": 8, "precision": "bf16", "compile": True}
ALL = "*"  # in `normalize`: every dataset that is not named


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a schedule of the rate; EMA of the weights."""

    lr: Annotated[float, Option("--lr", help="Peak learning rate of the policy."), Ge(0)] = 4e-4
    projector_lr_scale: Annotated[float, Ge(0)] = 0.5  # projector's rate = lr × this
    vlm_lr_scale: Annotated[
        float, Option("--vlm-lr-scale", help="The VLM's learning rate (LoRA or tower) as a share of --lr."), Ge(0)
    ] = 0.1
    vlm_lr_halved: Annotated[tuple[int, ...], Ge(1)] = ()  # steps at each of which the VLM's rate is halved
    weight_decay: Annotated[float, Ge(0)] = 1e-4  # on matrices; vectors have none
    betas: Annotated[tuple[float, float], Interval(ge=0, lt=1)] = (0.9, 0.95)
    warmup: Annotated[int, Ge(0)] = 500  # steps
    schedule: Annotated[
        Literal["cosine", "constant", "wsd"],
        Option(
            "--schedule",
            help="Learning rate after warm-up: cosine to 0 at --steps, constant, or wsd (constant, then linear to 0 "
            "over the last fifth, optimizer.decay).",
        ),
    ] = "cosine"
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.2  # share of the steps over which wsd decays, the last ones
    clip: Annotated[float, Gt(0)] = 1.0  # global gradient norm
    ema: Annotated[float, Interval(ge=0, lt=1)] = 0.9999  # decay, reached gradually: min(ema, (1+step)/(10+step))

    def __post_init__(self) -> None:
        require_ranges(self)


def _check_dit(name: str, value: Any) -> None:
    """`UserError` for a value that a DiT field cannot have. `dit_config` checks the names."""
    from ...drifting.dit import DiTConfig

    default = DiTConfig.__dataclass_fields__[name].default if name in DiTConfig.__dataclass_fields__ else None
    if name in ("action_dim", "proprio_dim", "denoising"):
        raise UserError(f"dit.{name} follows from the data and from loss.kind; leave it out")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"dit.{name} is {value!r}; it must be true or false")
        return
    if isinstance(default, (int, float)) and (isinstance(value, bool) or not isinstance(value, (int, type(default)))):
        raise UserError(f"dit.{name} is {value!r}; it must be a {'whole ' * isinstance(default, int)}number")
    if isinstance(default, (int, float)):
        require(f"dit.{name}", value, COUNT if isinstance(default, int) else Ge(0))


@dataclass(frozen=True)
class PanelConfig:
    """Panels of what is learned, drawn while training. They do not change what is learned."""

    every: Annotated[int, Ge(0)] = (
        500  # steps between most panels; others are 2.5 × as frequent or rarer, or at evaluations; 0 = none
    )
    share: Annotated[float, Interval(gt=0, le=1)] = (
        0.02  # of a run's time that they may take; panels that would take more are skipped; 1 = no limit
    )
    observations: Annotated[int, Interval(ge=8, le=2**16)] = 128  # held-out ones that they show, always the same
    draws: Annotated[int, Interval(ge=2, le=2**12)] = 8  # chunks predicted for each
    style: Literal["light", "dark"] = "light"

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. Needs the package, and an account only when online."""

    mode: Annotated[
        Literal["online", "offline", "disabled"],
        Option("--wandb-mode", help="Weights & Biases: online, offline or disabled."),
    ] = "disabled"
    project: Annotated[str, Option("--wandb-project", help="Project in Weights & Biases and in trackio.")] = "dvla"
    name: str | None = None  # what W&B and trackio call the run; None: the run folder's name


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, as saved in RUN/config.json."""

    cache: Annotated[
        str,
        Option(
            "--from-cache",
            help="Folder of a cache or of its WebDataset export; a cache of the hub, owner/name[@revision]; or a "
            "cache's URL (s3://…), with --local-cache.",
        ),
    ]
    out: str  # run folder
    init: Annotated[
        str | None,
        Option(
            "--init",
            help="Run or checkpoint to start from, on a cache of the features it sees (cache build --adapter).",
            type=Path,
        ),
    ] = None
    model_size: Annotated[str, Option("--model-size", help="Size of the network: tiny, small, base or large.")] = "base"
    # of the network: all 128 slots, or those alone that the cache's robots use (an ablation)
    action_space: Literal["unified", "active"] = "unified"
    dit: dict[str, Any] = field(default_factory=dict)  # overrides of the size's DiT fields, e.g. {"horizon": 8}
    steps: Annotated[int, Option("--steps", "--max-steps", help="Optimizer steps of the run."), Ge(1)] = 10_000
    batch_size: Annotated[int, Option("--batch-size", help="Observations per batch and device."), COUNT] = 16
    accumulate: Annotated[int, Option("--grad-accumulation", help="Batches per optimizer step."), COUNT] = 1
    draws: Annotated[int, Option("--draws", help="Noise samples per observation."), COUNT] = 4  # G
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: ConditionDropout = field(default_factory=ConditionDropout)
    image_aug: Annotated[
        bool, Option("--image-aug", help="Train on the cache's augmented image variants in half of the samples.")
    ] = False
    temperature: Annotated[
        float,
        Option("--temperature", help="Sample datasets in proportion to size^this: 1 by size, 0 uniformly."),
        SHARE,
    ] = 0.5  # the mixture exponent
    select: Selection = field(default_factory=Selection)  # which demonstrations of the cache
    weights: dict[str, float] = field(default_factory=dict)  # dataset → its share in [0, 1], in place of the above
    # dataset, or "*" for all others → how its actions and state are normalized, in place of its dataset config's
    normalize: dict[str, Scheme] = field(default_factory=dict)
    action_frame: Annotated[
        Frame,
        Option(
            "--action-frame",
            help="Frame of actions: absolute, or chunk (joints and poses relative to the state at a chunk's start).",
        ),
    ] = "absolute"
    history: Annotated[
        tuple[int, ...],
        Option("--history", help="Frames that the policy sees, as offsets from the current one: 0,-4,-8.", type=str),
        OFFSET,
    ] = ALONE
    proprio_history: Annotated[
        tuple[int, ...],
        Option("--proprio-history", help="The same of the robot's state: 0,-1,-2.", type=str),
        OFFSET,
    ] = ALONE
    order: Annotated[
        Literal["global", "block", "sequential"],
        Option("--order", help="Order of samples: global shuffle, block shuffle (slow disks) or sequential."),
    ] = "global"
    blind: Annotated[bool, Option("--blind", help="Train the proprioception-only baseline, with images blanked.")] = (
        False
    )
    alpha_max: Annotated[float, Ge(1)] = 1.0  # guidance scales are drawn from [1, this]; 1 = no guidance
    negatives: Annotated[int, COUNT] = 8  # unconditional negatives per observation when alpha_max > 1
    unfreeze: Annotated[dict[str, int], Ge(1)] = field(
        default_factory=dict
    )  # prefix of parameter names → step from which they train
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.05  # fraction of episodes kept for evaluation
    eval_every: Annotated[
        int, Option("--eval-every", help="Steps between evaluations on held-out episodes; 0: never."), Ge(0)
    ] = 1000
    eval_batches: Annotated[int, Option("--eval-batches", help="Batches of one evaluation."), COUNT] = 50
    save_every: Annotated[int, Option("--save-every", help="Steps between checkpoints."), Ge(1)] = 1000
    keep_last: Annotated[int, Ge(1)] = 2  # newest checkpoints kept
    keep_best: bool = True  # keep the one with the smallest held-out mse as well, saved when it is reached
    log_every: Annotated[int, Option("--log-every", help="Steps between log lines."), Ge(1)] = 50
    seed: Annotated[int, Option("--seed", help="Random seed: order of samples, noise, initialization."), Ge(0)] = 0
    local: Annotated[
        str | None, Option("--local-cache", help="Folder for local copies of the parts read from a cache behind a URL.")
    ] = None
    local_gib: Annotated[float | None, Gt(0)] = None  # room for shards in it, GiB; None = as many as there are
    threads: Annotated[int, Option("--num-workers", help="Loader threads."), THREADS] = 2
    cpu_threads: Annotated[int, Interval(ge=0, le=1024)] = (
        0  # of torch's CPU kernels; 0 = torch's choice. Small networks are fastest with 1
    )
    device: Annotated[str, DEVICE] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16"], Option("--precision", help="Precision of the forward pass (autocast): fp32 or bf16.")
    ] = "fp32"
    gradient_checkpointing: bool = False  # recompute the VLM's blocks in the backward pass (stage three): less memory
    compile: Annotated[
        bool,
        Option("--compile", help="Compile the network with torch.compile."),
    ] = False
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"  # kernel of the attention; the network is the same
    strategy: Annotated[
        Literal["ddp", "fsdp2", "zero2"],
        Option("--strategy", help="Strategy on several devices (torchrun): ddp, fsdp2 or zero2."),
    ] = "ddp"
    panels: PanelConfig = field(default_factory=PanelConfig)  # RUN/panels: what is learned
    trackers: Annotated[
        tuple[str, ...],
        Option(
            "--tracker",
            help="wandb, tensorboard or trackio, beside RUN/log.jsonl, which is always written; may be given several "
            "times.",
        ),
    ] = ()
    wandb: WandbConfig = field(default_factory=WandbConfig)  # how Weights & Biases is used

    def __post_init__(self) -> None:
        require_ranges(self)
        _ = self.past  # its offsets are checked
        if not self.loss.temperatures:
            raise UserError("loss.temperatures is empty; give at least one kernel width of the drift")
        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown("tracker", name, TRACKERS)
        for name, value in self.dit.items():
            _check_dit(name, value)
        if self.alpha_max > 1 and self.loss.kind not in ONE_STEP:
            raise UserError(
                f"alpha_max is {self.alpha_max}; it must be 1, or loss.kind one of {', '.join(ONE_STEP)}: a "
                f"{self.loss.kind} head has no unconditional negatives"
            )
        if self.action_space == "active" and self.loss.kind not in ONE_STEP:
            raise UserError(
                f"action_space active needs a head that acts in one pass ({', '.join(ONE_STEP)}); a {self.loss.kind} "
                "head reads all 128 slots"
            )
        if self.unfreeze and self.strategy == "zero2":
            raise UserError(
                "strategy zero2 cannot unfreeze parameters later, since its shards are laid out once; use ddp or fsdp2"
            )

    @property
    def past(self) -> History:
        """The offsets of its frames and states. `UserError` for some that cannot be."""
        return History(self.history, self.proprio_history)


@dataclass(frozen=True)
class FinetuneConfig:
    """Stage three: what it starts from, the images, and which VLM weights are trained."""

    start: str  # run or checkpoint of stage two
    sources: tuple[str, ...]  # the dataset folders or hub ids behind the cache
    train: TrainConfig  # settings of the loop; cache, network and horizon are the start's own
    lora: LoraSpec | None = None  # None = the VLM stays frozen but live, or
    full: bool = False  # all of the vision tower is trained, and the language layers where features come from these
    vlm_path: str | None = None  # where the VLM is now, if not where the cache was built from
    memory_gib: Annotated[float, Gt(0)] = 2.0  # room for decoded images

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.full and self.lora is not None:
            raise UserError("train either LoRA or the full VLM, not both")


LATER = (  # settings that runs of earlier releases do not have
    *("select", "normalize", "action_frame", "schedule", "decay", "order", "temperature", "weights", "unfreeze"),
    *("strategy", "sample_steps", "trackers", "history", "proprio_history"),
)


def read_settings(run: Path, whole: bool = True) -> dict[str, Any]:
    """RUN/config.json as it is. `UserError`, naming file and setting, for what no training writes.

    `whole`: settings must not lack but those that earlier releases did not have; to train by them."""
    path = run / "config.json"
    values = read_json(path)
    stage_three = values.pop("stage_three", None)
    from_document(TrainConfig, values, path)
    for group, found in (("", TrainConfig), ("loss.", LossConfig), ("optimizer.", OptimizerConfig)):
        inside = values.get(group.rstrip("."), {}) if group else values
        names = [f.name for f in fields(found) if f.name not in LATER]  # type: ignore[arg-type]
        if missing := [name for name in names if whole and name not in inside]:
            raise UserError(f"{path} is damaged: '{group}{missing[0]}' is missing; restore it from a copy")
    if stage_three is None:
        return values
    require_form(stage_three, path, StageThreeForm)
    if stage_three["lora"] is not None:
        from_document(LoraSpec, stage_three["lora"], path, "stage_three.lora")
    return {**values, "stage_three": stage_three}


class StageThreeForm(Form):
    """What config.json says of stage three besides the settings."""

    start: str
    lora: dict[str, Any] | None
    full: bool = False
    language: bool = False  # whether a full training includes language layers


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return shipped("train")


def load_recipe(name_or_file: str) -> dict[str, Any]:
    """The mapping of a recipe: a YAML file, or a shipped one by name. `UserError` for an unknown name."""
    return load_shipped("train", name_or_file)


def train_config(recipe: str | None, overrides: dict[str, Any]) -> TrainConfig:
    """`TrainConfig` from a recipe and dotted overrides; unknown keys are refused with the nearest name."""
    known: dict[str, Any] = {f.name: f.default_factory for f in fields(TrainConfig)}
    groups = {name: [f.name for f in fields(group)] for name, group in known.items() if is_dataclass(group)}
    for key in overrides:
        if key not in known and (found := [f"{group}.{key}" for group, names in groups.items() if key in names]):
            raise UserError(f"unknown setting '{key}'; did you mean '{found[0]}'?")
    values = with_offsets(apply(load_recipe(recipe) if recipe else {}, overrides))
    if isinstance(values.get("normalize"), str):  # one for all, as a dataset config says it
        values["normalize"] = {ALL: values["normalize"]}
    defaults = device_defaults(values.get("device", "auto"), values.get("out", ""))
    return from_mapping(TrainConfig, defaults | values, "training settings")


def device_defaults(device: str, out: str) -> dict[str, Any]:
    """The settings of `ON_CUDA` for a run on `device`, which its config.json will hold.

    A run that is there already, in `out`, keeps those that it had from a default, of whichever device."""
    if out and (Path(out) / "config.json").is_file():
        begun = read_settings(Path(out), whole=False)
        plain = {f.name: f.default for f in fields(TrainConfig)}
        return {name: begun[name] for name, value in ON_CUDA.items() if begun.get(name) in (plain[name], value)}
    import torch  # which a look at the settings alone does not need

    from ..policy.compile import missing_compiler

    if not isinstance(device, str) or not (device.startswith("cuda") or device == "auto" and torch.cuda.is_available()):
        return {}
    able = {"compile": not missing_compiler("cuda")}
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        able["precision"] = False
    return {name: value for name, value in ON_CUDA.items() if able.get(name, True)}


def with_offsets(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with the offsets of a history as lists, which a command line gives as text."""
    return values | {
        name: parse_offsets(values[name], name) for name in ("history", "proprio_history") if name in values
    }
