"""Settings of a build and of its workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Interval

from ...cache.actions.selection import Selection
from ...cache.store.feature_format import FeatureFormat, feature_format
from ...cache.vlm.spec import EncoderSpec, encoder_spec
from ...common.config import COUNT, DATASET_CONFIG, DEVICE, VLM_PATH, WORKERS, Option, require_ranges
from ...errors import UserError
from .quarantine import USUAL, most_allowed

SHARD_NBYTES = 256 << 20  # default size of a shard: large enough to stream, small enough to redo
SHARD_ROWS = 1 << 14  # and at most so many records, however small: each costs 16 bytes of index, in the last shard too


@dataclass(frozen=True)
class WorkerSpec:
    """Where shards are made. All zero or None: in this process."""

    count: Annotated[
        int,
        Option("--workers", help="Worker processes (with --slurm: jobs), one per GPU where there are GPUs; 0: none."),
        WORKERS,
    ] = 0
    scheduler: Annotated[
        str | None, Option("--scheduler", help="Address of a running dask scheduler, e.g. tcp://host:8786.")
    ] = None
    slurm: Annotated[
        str | None,
        Option("--slurm", help="YAML of a Slurm cluster (as configs/launch/slurm.yaml) to start workers on."),
    ] = None

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.scheduler and self.slurm:
            raise UserError("--scheduler and --slurm exclude each other: give one")
        if self.scheduler and "://" not in self.scheduler:
            raise UserError(f"--scheduler {self.scheduler}: give an address like tcp://host:8786")

    @property
    def active(self) -> bool:
        """Whether any worker is asked for."""
        return bool(self.count or self.scheduler or self.slurm)


@dataclass(frozen=True)
class BuildConfig:
    """What `dvla cache build` needs."""

    sources: tuple[str, ...]  # dataset folders or hub ids
    encoder: EncoderSpec  # which VLM, at which resolution, how many tokens
    out: Annotated[Path, Option("--out", help="Cache folder; an unfinished one is resumed.")]
    # part of the fingerprint, since it changes the last bits; of all views, where these are encoded together
    batch_size: Annotated[int, Option("--batch-size", help="Images per encoder call."), COUNT] = 64
    shard_frames: Annotated[
        int | None, Option("--shard-frames", help="Frames per shard file; default: about 256 MiB."), COUNT
    ] = None
    device: Annotated[str, DEVICE] = "auto"
    dataset_config: Annotated[str | None, DATASET_CONFIG] = None
    format: FeatureFormat = field(default_factory=FeatureFormat)  # 16 or 8 bit, compressed or not
    frame_stride: Annotated[
        int, Option("--frame-stride", help="Store features of every n-th frame; actions and states of all."), COUNT
    ] = 1
    views: Annotated[
        tuple[str, ...], Option("--view", help="Camera to encode; may be given several times. Default: all.")
    ] = ()
    augment: Annotated[int, Option("--augment", help="Augmented variants of every image."), Interval(ge=0, le=64)] = 0
    select: Selection = field(default_factory=Selection)  # which demonstrations
    max_quarantine: Annotated[
        str,
        Option(
            "--max-quarantine",
            help="Most episodes that may be unusable, e.g. 5% or 12; above that the build does not finish.",
        ),
    ] = USUAL
    allow_quarantine: Annotated[
        bool, Option("--allow-quarantine", help="Finish however many episodes are unusable.")
    ] = False
    mode: str = "new"  # new; append: new episodes in a new generation; update: whatever changed
    workers: WorkerSpec = field(default_factory=WorkerSpec)

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class FeatureChoice:
    """The features that a command line asks for: a VLM, changes of that model's settings (None: none), and storage."""

    vlm: Annotated[
        str | None,
        Option("--vlm", help="Model: qwen3vl (the default), paligemma2, or a tiny one (configs/models)."),
    ] = None
    vlm_path: Annotated[str | None, VLM_PATH] = None
    adapter: Annotated[
        Path | None,
        Option("--adapter", help="Run or checkpoint of `dvla finetune` whose fine-tuned VLM encodes."),
    ] = None
    resolution: Annotated[
        int | None,
        Option("--resolution", help="Side of the padded, resized image; default: the model's own."),
        Interval(ge=1, le=2**14),
    ] = None
    tokens: Annotated[
        int | None,
        Option("--tokens", help="Tokens per image, averaged on the grid (196, 49, 16 …); default: all."),
        COUNT,
    ] = None
    features: Annotated[
        str | None,
        Option(
            "--features",
            help="Features after the model's own projection (merged), or before it (patch): more and narrower.",
        ),
    ] = None
    depth: Annotated[
        str | None,
        Option(
            "--depth",
            help="Depth of the features. vision: each image for itself. language: hidden states of the language model, "
            "which has read the images and the instruction; condition dropout cannot remove that.",
        ),
    ] = None
    layers: Annotated[
        str | None,
        Option(
            "--layers",
            "--layer",
            help="Layers of the language model, 16 or 8,16,24 (default: 4/7 of them, of paligemma2 the last); or "
            "deepstack: with depth vision, also what qwen3vl feeds into its first language layers.",
        ),
    ] = None
    layers_as: Annotated[
        str | None,
        Option("--layers-as", help="Several layers: side by side in the width (default), or as tokens."),
    ] = None
    keep: Annotated[
        str | None,
        Option(
            "--keep",
            help="Tokens to keep with depth language: image, or all from the image on, the instruction's too "
            "(default of qwen3vl: all, of paligemma2: image).",
        ),
    ] = None
    pool: Annotated[
        str | None,
        Option(
            "--pool",
            help="queries:N: with depth language, N query tokens are read after the prompt and kept alone. (--tokens "
            "averages on the image's grid.)",
        ),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        Option("--prompt-tokens", help="Room for tokens after the image's with --keep all; default 32."),
        COUNT,
    ] = None
    boundary: Annotated[
        int | None,
        Option(
            "--boundary",
            help="Store what enters the last n blocks of the vision tower, or with depth language the last n language "
            "layers, in place of features: for `dvla finetune --lora --from-cache`, which then runs those n only.",
        ),
        COUNT,
    ] = None

    dtype: Annotated[
        str, Option("--dtype", help="Stored data type: fp16, int8 or fp8 (with channel and token scales).")
    ] = "fp16"
    compression: Annotated[
        str, Option("--compression", help="Lossless compression, for slow disks: none, zstd or lz4.")
    ] = "none"

    def spec(self) -> EncoderSpec:
        """The encoder. `UserError` for an unknown model, or settings that exclude each other."""
        if self.adapter and self.vlm:
            raise UserError("--adapter brings the VLM that it was trained in; leave --vlm out")
        same = "resolution tokens features depth boundary layers_as keep prompt_tokens"
        changes: dict[str, Any] = {name: getattr(self, name) for name in same.split()}
        changes |= {"queries": _queries(self.pool)} | _layers(self.layers)
        if self.adapter:
            from ..policy.load import adapted_spec  # and torch with it

            return adapted_spec(self.adapter, path=self.vlm_path, **changes)
        return encoder_spec(self.vlm or "qwen3vl", path=self.vlm_path, **changes)

    def format(self) -> FeatureFormat:
        """How they are stored. `UserError` for an unknown name."""
        return feature_format(self.dtype, self.compression)


def _layers(given: str | None) -> dict[str, Any]:
    """The settings of the encoder that "16", "8,16,24" or "deepstack" mean. `UserError` for anything else."""
    if given is None:
        return {}
    if given == "deepstack":
        return {"deepstack": True}
    numbers = given.split(",")
    if not all(n.strip().isdecimal() and len(n) < 6 for n in numbers):
        raise UserError(f"--layers {given}: give numbers of language layers, as 16 or 8,16,24, or deepstack")
    return {"layers": tuple(int(n) for n in numbers)}


def _queries(given: str | None) -> int | None:
    """How many query tokens "queries:N" means. `UserError` for anything else."""
    if given is None:
        return None
    kind, _, count = given.partition(":")
    if kind != "queries" or not count.isdecimal() or not 1 <= len(count) < 6:
        raise UserError(f"--pool {given}: give queries:N, as queries:64; --tokens N averages on the image's grid")
    return int(count)


def check_settings(config: BuildConfig) -> None:
    """`UserError` for settings that no build can run with."""
    if config.mode not in ("new", "append", "update"):
        raise UserError(f"build mode '{config.mode}' is not one of new, append, update")
    if not config.sources and config.mode == "new":
        raise UserError("no source given; name at least one dataset folder or hub id")
    most_allowed(config.max_quarantine, 1)


@dataclass(frozen=True)
class PilotConfig:
    """What `plan` needs besides the build's own settings."""

    images: Annotated[
        int, Option("--pilot", help="Images to measure with, over all datasets and views."), Interval(ge=2, le=10**6)
    ] = 64
    price: Annotated[
        float | None, Option("--price", help="Price in USD per hour of everything that builds."), Gt(0)
    ] = None
    train_rate: Annotated[
        float | None,
        Option(
            "--train-samples-per-second",
            help="Samples/s of the policy alone, or 'measured': trained here for a moment.",
            type=str,
        ),
        Gt(0),
    ] = None
    measure_model: bool = False  # measure that here
    model_size: Annotated[
        str, Option("--model-size", help="Size of the policy to measure: tiny, small, base or large.")
    ] = "base"
    draws: Annotated[
        int, Option("--draws", help="Noise samples that share one observation."), Interval(ge=1, le=2**16)
    ] = 4
    disk_rate: Annotated[  # bytes/s
        float | None,
        Option("--disk-rate", help="Read rate in GB/s of the disk to train from; default: measured at --out."),
        Gt(0),
    ] = None

    def __post_init__(self) -> None:
        require_ranges(self)
