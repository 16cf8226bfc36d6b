"""The command line: help with an example everywhere, and bad input is one clear line with exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dvla import __version__, cli
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.common.doctor import doctor
from dvla.stages.training.config import recipe_names
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, Result, refused

TINY = TinySpec(
    vision_depth=2, vision_width=32, vision_heads=2, vision_mlp=2, out_width=32, text_layers=1, vocabulary=512
)
SMALL = [
    "--model-size",
    "tiny",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--set",
    "threads=1",
    "--set",
    "holdout=0.0",
    "--set",
    "dit={width: 32, blocks: 1, heads: 2, horizon: 4}",
]


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command line of the program without its options."""
    command = command or typer.main.get_command(cli.app)
    children = getattr(command, "commands", {})
    for name, child in children.items():
        yield from commands(child, (*path, name))
    if not children:
        yield path


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def test_the_commands() -> None:
    assert {" ".join(c) for c in commands()} >= {
        "data record",
        "vlm tiny",
        "cache build",
        "cache verify",
        "train",
        "finetune",
        "eval",
        "demo",
        "doctor",
    }


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_has_an_example(dvla: Dvla, path: tuple[str, ...]) -> None:
    result = dvla(*path, "--help")
    assert result.code == 0 and result.err == ""
    text = " ".join(result.out.replace("│", " ").split())
    assert "Example" in text and f"dvla {' '.join(path)}" in text.split("Example", 1)[1]


def test_version(dvla: Dvla) -> None:
    assert dvla("--version") == Result(0, f"dvla {__version__}\n", "")


def test_without_a_command_there_is_help(dvla: Dvla) -> None:
    for arguments in ((), ("cache",)):
        result = dvla(*arguments)
        assert result.code == 2 and "Usage" in result.out + result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("train --bogus 1", ["No such option: --bogus", "dvla train --help"]),
        ("train --optimizer.warmup 5", ["No such option: --optimizer.warmup", "written --optimizer.warmup=VALUE"]),
        ("train --out x", ["Missing option '--from-cache'"]),
        ("train --from-cache x --out y --steps ten", ["--steps"]),
        ("cache biuld x --out y", ["biuld", "dvla cache --help"]),
        ("nothing", ["nothing"]),
        ("cache build --out y", ["no source given", "at least one dataset folder or hub id"]),
    ],
)
def test_wrong_usage(dvla: Dvla, arguments: str, words: list[str]) -> None:
    refused(dvla(*arguments.split()), *words)


def test_missing_paths(dvla: Dvla, tmp_path: Path, vlm: Path, recorded: dict[str, Path]) -> None:
    none, out = tmp_path / "none", tmp_path / "out"
    refused(dvla("train", "--from-cache", none, "--out", out), f"no cache at {none}", "dvla cache build")
    refused(dvla("cache", "verify", none), f"no cache at {none}")
    refused(dvla("cache", "build", none, "--vlm", "tiny_qwen3vl", "--vlm-path", vlm, "--out", out), str(none))
    refused(
        dvla("cache", "build", recorded["h264"], "--vlm", "tiny_qwen3vl", "--vlm-path", none, "--out", out), str(none)
    )
    refused(dvla("cache", "build", recorded["h264"], "--vlm", "tiny_qwen3vl", "--out", out), "--vlm-path")
    refused(
        dvla("finetune", none, "--source", recorded["h264"], "--out", out),
        f"no run or checkpoint at {none}",
        "dvla train",
    )
    refused(dvla("eval", none, "--env", "metaworld/push-v3"), f"no run or checkpoint at {none}")
    assert not out.exists()


def test_unknown_names(dvla: Dvla, tmp_path: Path, cache: Path, recorded: dict[str, Path]) -> None:
    out = tmp_path / "out"
    refused(
        dvla("data", "record", "--env", "metaworld/psuh-v3", "--out", out),
        "unknown environment 'metaworld/psuh-v3'",
        "did you mean 'metaworld/push-v3'",
    )
    refused(dvla("vlm", "tiny", "--arch", "qwen3", "--out", out), "unknown architecture 'qwen3'", "'qwen3vl'")
    refused(
        dvla("cache", "build", recorded["h264"], "--vlm", "qwen3v", "--out", out),
        "unknown model 'qwen3v'",
        "did you mean 'qwen3vl'",
    )
    refused(
        dvla("cache", "build", recorded["h264"], "--dataset-config", "metawrld", "--vlm-path", tmp_path, "--out", out),
        "unknown dataset config 'metawrld'",
        "did you mean 'metaworld'",
    )
    train = ("train", "--from-cache", cache, "--out", out)
    refused(dvla(*train, "--set", "batchsize=3"), "unknown setting 'batchsize'", "did you mean 'batch_size'")
    refused(dvla(*train, "--set", "optimizer.warmpu=3"), "unknown setting 'warmpu'", "did you mean 'warmup'")
    refused(dvla(*train, "--set", "batch_size"), "expected name=value")
    refused(dvla(*train, "--set", "dit={width: "), "--set dit={width: : the value is not valid YAML")
    refused(dvla(*train, "--recipe", "no-such-recipe"), "unknown recipe 'no-such-recipe'")
    refused(dvla(*train, "--recipe", tmp_path / "none.yaml"), "cannot read", "none.yaml")
    refused(dvla(*train, "--model-size", "tyny"), "unknown DiT size 'tyny'", "did you mean 'tiny'")
    refused(dvla(*train, "--loss-type", "hybird"), "did you mean 'hybrid'")
    refused(dvla(*train, "--device", "gpu"), "device 'gpu' is not one of auto, cpu, cuda")
    refused(
        dvla("finetune", out, "--source", "x", "--out", out, "--lora-targets", "all"),
        "LoRA.targets: unknown value 'all'",
    )
    assert not out.exists()


def test_incomplete_cache(dvla: Dvla, tmp_path: Path) -> None:
    synthetic.build(tmp_path / "cache", stop_after=3)
    for arguments in (
        ("train", "--from-cache", tmp_path / "cache", "--out", tmp_path / "run"),
        ("cache", "verify", tmp_path / "cache"),
    ):
        refused(dvla(*arguments), "is incomplete (3 shards are finished)", "rerun the same `dvla cache build`")
    (tmp_path / "empty").mkdir()
    refused(dvla("cache", "verify", tmp_path / "empty"), "is not a dvla cache")


def test_build_verify_and_mismatched_fingerprint(
    dvla: Dvla, tmp_path: Path, vlm: Path, recorded: dict[str, Path]
) -> None:
    build = (
        "cache",
        "build",
        recorded["h264"],
        "--vlm",
        "tiny_qwen3vl",
        "--vlm-path",
        vlm,
        "--out",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--resolution",
    )
    result = dvla(*build, 64)
    assert (
        result.code == 0 and "39 frames" in result.out and "0 episodes in quarantine" in result.out and result.err == ""
    )
    assert "already complete" in dvla(*build, 64).out
    refused(dvla(*build, 96), "encoder.resolution: cache has 64, you requested 96", "Choose another --out")
    verify = dvla("cache", "verify", tmp_path / "cache", "--live", 4, "--device", "cpu")
    assert verify.code == 0 and "4 frames recomputed" in verify.out and "all files are intact" in verify.out
    victim = sorted((tmp_path / "cache").glob("*/features/*/c/0/0/0"))[0]
    content = bytearray(victim.read_bytes())
    content[7] ^= 1
    victim.write_bytes(content)
    broken = dvla("cache", "verify", tmp_path / "cache")
    assert (
        broken.code == 1 and victim.relative_to(tmp_path / "cache").as_posix() in broken.err and "altered" in broken.err
    )


def test_existing_output_folder(dvla: Dvla, tmp_path: Path, cache: Path, vlm: Path, recorded: dict[str, Path]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(dvla("data", "record", "--env", "metaworld/push-v3", "--out", tmp_path), str(tmp_path), "exists")
    refused(dvla("vlm", "tiny", "--out", tmp_path), f"{tmp_path} exists", "choose another --out")
    refused(
        dvla(
            "cache",
            "build",
            recorded["h264"],
            "--vlm",
            "tiny_qwen3vl",
            "--vlm-path",
            vlm,
            "--out",
            tmp_path,
            "--device",
            "cpu",
        ),
        "holds other files (notes.txt)",
        "choose another --out",
    )
    refused(
        dvla("train", "--from-cache", cache, "--out", tmp_path, *SMALL), "holds other files", "choose another --out"
    )
    refused(dvla("eval", tmp_path, "--env", "metaworld/push-v3", "--out", tmp_path), f"{tmp_path} exists")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_train_resume_and_changed_settings(dvla: Dvla, tmp_path: Path, cache: Path) -> None:
    train = ("train", "--from-cache", cache, "--out", tmp_path / "run", *SMALL, "--set", "optimizer.warmup=1")
    first = dvla(*train, "--stop-after", 1)
    assert first.code == 0 and f"{tmp_path / 'run'}: step 1 of 2\n" in first.out and first.err == ""
    assert first.out.endswith("rerun without --stop-after to resume\n")
    second = dvla(*train)
    assert second.code == 0 and "resuming" in second.out and f"{tmp_path / 'run'}: step 2 of 2\n" in second.out
    assert f"checkpoint: {tmp_path / 'run'}/checkpoints/step-00000002\nnext: dvla finetune --lora" in second.out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["optimizer"]["warmup"] == 1 and saved["dit"]["width"] == 32
    refused(dvla(*train, "--lr", "0.5"), "has other settings", "optimizer.lr")
    refused(dvla("finetune", tmp_path / "run", "--source", tmp_path / "none", "--out", tmp_path / "run2"), "nowhere")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "moved")
    refused(
        dvla("finetune", tmp_path / "moved", "--source", "x", "--out", tmp_path / "run2"), "is not inside a run folder"
    )
    refused(dvla("eval", tmp_path / "run", "--env", "metaworld/psuh-v3"), "did you mean 'metaworld/push-v3'")
    refused(dvla("eval", tmp_path / "run", "--env", "metaworld/push-v3"), "0 recorded in 'metaworld/push-v3'")
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(dvla: Dvla, tmp_path: Path, name: str) -> None:
    """A recipe passes all checks and training gets as far as the cache, which is not there."""
    refused(
        dvla("train", "--from-cache", tmp_path / "none", "--out", tmp_path / "run", "--recipe", name), "no cache at"
    )


def test_doctor(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    result = dvla("doctor")
    needed = [f for f in doctor.examine() if f.required]
    assert {"python", "torch", "transformers"} <= {f.name for f in needed}
    assert result.code == 0 and "torch" in result.out and "lerobot" in result.out
    for required, code in ((False, 0), (True, 1)):
        finding = doctor.Finding("flux capacitor", None, "no time", "pip install 'flux[all]'", required)
        monkeypatch.setattr(doctor, "examine", lambda finding=finding: [finding])
        result = dvla("doctor")
        assert result.code == code and "missing" in result.out and "flux[all]" in result.out


def test_interrupt_is_130(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    result = dvla("doctor")
    assert (
        result.code == 130
        and len(result.err.splitlines()) == 1
        and result.err.startswith("interrupted; rerun the same")
    )
