"""Tiny inputs of every command, a line of each that works on them, and where its long work is cut short."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FILES = (
    "data",
    "cache",
    "cache2",
    "run",
    "tuned",
    "policy",
    "eval",
    "stats.json",
    "recipe.yaml",
    "ablation.yaml",
    "dataset.yaml",
    "cluster.yaml",
    "slurm.yaml",
    "launch.sh",
    "token",
    "words.txt",
    "file.yaml",
    "file.sh",
    "empty.json",
)
CPU = {"--device": "cpu"}
TRAIN: dict[str, Any] = {"--model-size": "tiny", "--steps": "1", "--batch-size": "2", **CPU}
SMALL = ["threads=1", "holdout=0.0", "panels.every=0", "dit={width: 16, blocks: 1, heads: 2, horizon: 4}"]
VLM = {"--vlm": "tiny_qwen3vl", "--vlm-path": "vlm", **CPU}
# Command → its arguments that work; None: a flag.
LINES: dict[str, dict[str, Any]] = {
    "ablate": {"recipe": "lambda", "--print": None},
    "bench latency": {"--model-size": "tiny", "--views": "1", "--repeats": "1", "--warm-up": "0", **CPU},
    "cache build": {"sources": "data", "--out": "new", "--batch-size": "8", **VLM},
    "cache diff": {"a": "cache", "b": "cache2"},
    "cache export": {"path": "cache", "--out": "new"},
    "cache gc": {"path": "cache"},
    "cache import": {"source": "export", "--out": "new"},
    "cache inspect": {"path": "cache"},
    "cache plan": {"sources": "data", "--out": "new", "--pilot": "2", **VLM},
    "cache pull": {"url": "file:///none", "--out": "new"},
    "cache push": {"path": "cache", "url": "s3://none/x"},
    "cache repair": {"path": "cache", **CPU},
    "cache status": {"path": "cache"},
    "cache verify": {"path": "cache", **CPU},
    "compare": {"runs": ["run", "tuned"]},
    "cotrain": {"sources": "data", "--out": "new", "--vlm": "tiny_qwen3vl", "--vlm-path": "vlm"},
    "data add": {"source": "data", "--out": "new.yaml", "--yes": None},
    "data check": {"source": "data"},
    "data export": {"source": "data", "--out": "new"},
    "data list": {},
    "data record": {"--env": "toy/near", "--out": "new", "--episodes": "1", "--image-size": "64"},
    "data show": {"source": "data"},
    "data stats": {"source": "data"},
    "data video": {"source": "data", "--episode": "0", "--out": "new.mp4"},
    "demo": {"--out": "new"},
    "doctor": {},
    "eval": {
        "policy": "expert",
        "--env": "toy/near",
        "--episodes": "1",
        "--image-size": "64",
        "--videos": "1",
        "--baselines": "none",
    },
    "export": {"checkpoint": "policy", "--out": "new"},
    "finetune": {
        "start": "tuned",
        "--out": "new",
        "--steps": "1",
        "--batch-size": "2",
        "--set": ["panels.every=0", "holdout=0.0"],
        **CPU,
    },
    "launch": {"script": "torchrun", "--print": None, "command": ["--", "train", "--from-cache", "c", "--out", "r"]},
    "push": {"policy": "policy", "repo": "owner/name"},
    "report": {"run": "run", "--out": "new.html"},
    "rerun": {"run": "policy", "--source": "data", "--out": "new.rrd", **CPU},
    "serve": {"policy": "policy", "--port": "0", **CPU},
    "toy": {"--out": "new", "--quick": None},
    "train": {"--from-cache": "cache", "--out": "new", **TRAIN, "--set": SMALL},
    "vlm tiny": {"--out": "new"},
}


def values_of(name: str, what: str) -> list[str]:
    """Values of an option that might be meant well."""
    known = {
        "--set": ["steps=2", "optimizer.warmup=0", "panels.every=1", "loss.queue=task"],
        "--shard-size": ["1KiB", "1MB", "0", "1e3GiB", "99999999999TiB", "5"],
        "--format": ["webdataset", "onnx", "torch-export", "lerobot"],
        "--out": ["new", "run", "data", "cache", "other"],
        "--normalize": ["minmax", "alpha=quantile", "none=std5"],
        "--weight": ["alpha=0.5", "alpha=nan", "alpha=inf", "alpha=-1", "alpha=2", "gamma=0.5", "=0.5"],
        "--url": ["file:///none"],
        "--source": ["data", "missing"],
        "--recipe": ["tiny", "base", "recipe.yaml"],
        "--cluster": ["cluster", "cluster.yaml"],
        "--slurm": ["slurm.yaml"],
        "--model-size": ["tiny", "small"],
        "--vlm-mode": ["lora", "full", "frozen"],
        "--token-file": ["token"],
        "--eval": ["eval"],
        "--merge": ["stats.json"],
        "--image-size": ["64x64", "8x8", "100000x100000", "0x64", "64x", "x"],
        "--dataset-config": ["metaworld", "dataset.yaml"],
        "--scheduler": ["tcp://127.0.0.1:9", "inproc://", "x://", "tcp://"],
    }
    return known.get(name, [])


def write_samples(base: Path) -> None:
    """Everything that the lines read, once."""
    from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
    from dvla.cli import run
    from dvla.common.config import configs_dir
    from support import lerobot_written, run_samples, synthetic_cache

    base.mkdir(parents=True)
    os.chdir(base)
    lerobot_written.write_v3(base / "data")
    synthetic_cache.build(base / "cache")
    make_tiny_qwen3vl(base / "vlm", run_samples.TINY)
    settings = [word for line in SMALL for word in ("--set", line)]
    run(["train", "--from-cache", "cache", "--out", "run", *_words(TRAIN), *settings])
    run(["cache", "build", "data", "--out", "cache2", "--resolution", "64", *_words(VLM)])
    run(["train", "--from-cache", "cache2", "--out", "tuned", *_words(TRAIN), *settings])
    run(["cache", "export", "cache", "--out", "export"])
    run_samples.make_run(base / "policy", base / "vlm")
    run(["data", "stats", "data", "--out", "stats.json"])
    (base / "eval").mkdir()
    (base / "eval" / "summary.json").write_text('{"policy": "x", "tasks": {}, "seconds": 1.0, "settings": {}}')
    recipe = {
        "steps": 2,
        "batch_size": 2,
        "model_size": "tiny",
        "threads": 1,
        "holdout": 0.0,
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
        "dit": {"width": 16, "blocks": 1, "heads": 2, "horizon": 4},
        "loss": {"kind": "hybrid", "temperatures": [0.02, 0.2]},
        "panels": {"every": 0},
        "masking": {"text": 0.1},
        "weights": {"alpha": 0.5},
        "normalize": {"alpha": "minmax"},
        "unfreeze": {"dit": 1},
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, file in {
        "ablation": "ablations/lambda",
        "dataset": "datasets/metaworld",
        "cluster": "launch/cluster",
        "slurm": "launch/slurm",
    }.items():
        shutil.copy(configs_dir() / f"{file}.yaml", base / f"{name}.yaml")
    shutil.copy(configs_dir() / "launch" / "torchrun.sh", base / "launch.sh")
    (base / "token").write_text("t" * 20)
    for name in ("words.txt", "file.yaml", "file.sh"):
        (base / name).write_text("some words\n")
    (base / "empty.json").touch()


def special_files(work: Path, base: Path) -> None:
    """What stands in the place of a file, and what is large, beside a trial's copies."""
    for name in ("vlm", "export"):
        (work / name).symlink_to(base / name)
    for name in ("folder", "dir.yaml", "dir.sh"):
        (work / name).mkdir()
    for name in ("fifo", "fifo.yaml", "fifo.sh"):
        os.mkfifo(work / name)
    (work / "loop").symlink_to("loop")
    (work / "zero.yaml").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(work)  # a socket's path is short
        one.bind("socket")
        os.chdir(here)


def _words(given: dict[str, str]) -> list[str]:
    return [word for pair in given.items() for word in pair]


def cut_short() -> None:
    """Work that is merely long is not done: the options were accepted."""
    from dvla.stages.caching import build_plan
    from dvla.stages.experiments import runner
    from dvla.stages.experiments.ablate import run as ablation
    from dvla.stages.serving.server import PolicyServer
    from dvla.stages.simulation import envs
    from dvla.stages.simulation.lerobot_writer import LeRobotWriter
    from dvla.stages.training import loop
    from fuzz.trial import StandIn
    from support.toy_environment import Adapter

    def enough(*_: object, **__: object) -> Any:
        raise SystemExit(0)

    build_plan.load_encoder = lambda spec, device, say=None: StandIn(spec)  # type: ignore[assignment, return-value]
    envs.ADAPTERS = (*envs.ADAPTERS[:9], Adapter)
    runner.run_in_order.__globals__["_run_together"] = enough
    ablation.run_side_by_side = ablation._prepare = enough  # type: ignore[assignment]
    PolicyServer.run = PolicyServer.warm_up = enough  # type: ignore[method-assign]
    loss = loop.batch_loss

    def few(*given: Any, **how: Any) -> Any:
        _taken[0] += 1
        if _taken[0] > 6:
            enough()
        return loss(*given, **how)

    loop.batch_loss = few
    LeRobotWriter.add = enough
    from dvla.stages.experiments.toy import toy

    toy.train_plane = toy.train_actions = enough  # type: ignore[assignment]
    os.environ["HF_HUB_OFFLINE"] = "1"


_taken = [0]  # batches of this trial's training


def few_steps() -> None:
    """A new trial begins."""
    _taken[0] = 0


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
