"""The dependency arrows and the fences around third parties, read from the source, as tables."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Part of the package → parts it may import besides itself and the leaf modules. "" = the leaf modules in the root.
ARROWS = {
    "": set(),
    "cache": set(),
    "drifting": set(),
    "stages": {"cache", "drifting"},
    "cli": {"cache", "drifting", "stages"},
}
# Third party → files, or folders ending in "/", that may import it. An entry without a user is refused too.
FENCES = {
    "typer": {"cli.py", "cli_ablate.py", "cli_cache.py", "cli_data.py", "cli_report.py", "cli_eval.py", "cli_hub.py", "cli_launch.py", "cli_serve.py", "cli_train.py"},
    "rich": {"stages/"},
    "transformers": {"cache/paligemma2.py", "cache/qwen3vl.py", "cache/tiny_paligemma.py", "cache/tiny_vlm.py", "cache/vlm_files.py"},
    "flash_attn": {"cache/attention.py", "drifting/attention.py"},
    "peft": {"cache/encoder.py", "cache/lora.py"},
    "lerobot": {"stages/lerobot_plugin/__init__.py", "stages/record.py"},
    "datasets": {"stages/record.py"},
    "metaworld": {"stages/envs/metaworld.py"},
    "mujoco": {"stages/envs/mujoco_render.py"},
    "mani_skill": {"stages/envs/maniskill.py"},
    "sapien": {"stages/envs/maniskill.py"},
    "rlbench": {"stages/envs/rlbench.py"},
    "pyrep": {"stages/envs/rlbench.py"},
    "isaacgym": {"stages/envs/isaac_worker.py"},
    "robosuite": {"stages/envs/robosuite_dex.py"},
    "av": {"cache/video.py", "stages/video_out.py"},
    "zarr": {"cache/readers/replay_buffer.py"},
    "h5py": {"cache/readers/"},
    "dask": {"stages/cluster.py"},
    "distributed": {"stages/cluster.py", "stages/workers.py"},
    "dask_jobqueue": {"stages/cluster.py"},
    "numcodecs": {"cache/codec.py"},
    "webdataset": {"cache/webdataset_io.py"},
    "fsspec": {"cache/places.py"},
    "pyvista": {"cache/readers/point_render.py"},
    "vtkmodules": {"cache/readers/point_render.py"},
    "scipy": {"cache/readers/dexgraspnet_scene.py"},
    "wandb": {"stages/tracking.py"},
    "deepspeed": {"stages/zero2.py"},
    "onnxruntime": {"stages/policy_graph.py"},
    "jinja2": {"stages/pages.py"},
    "rerun": {"stages/rerun_export.py"},
    "websockets": {"stages/serving/"},
    "msgpack": {"stages/serving/"},
}
UNUSED = {"lerobot", "datasets", "mujoco", "pyvista", "vtkmodules"}  # fenced before use: entries that need no user
# Modules through which pure mathematics could reach a file, the network or another process.
IO_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "json", "pickle", "yaml", "mmap", "glob", "subprocess",
              "socket", "urllib", "requests", "safetensors", "huggingface_hub", "pyarrow", "PIL", "av", "zarr"}
IO_CALLS = {"open", "load", "save", "memmap", "fromfile", "tofile", "loadtxt", "savetxt", "print"}
HEAVY = ("torch", "transformers", "peft", "av", "pyarrow", "lerobot", "metaworld", "mujoco", "matplotlib")


@cache
def package_files() -> tuple[Path, ...]:
    """Every Python file of the package, from the list of packages in pyproject.toml."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in packages]
    return tuple(p for folder in folders for p in sorted(folder.glob("*.py")))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def imports(file: Path) -> tuple[tuple[str, int, str], ...]:
    """(module, relative level, first part inside the package or "") of every import, also inside functions."""
    here, found = file.relative_to(ROOT).parent.parts, []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, 0, ""))
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(here) + 1, f"{name_of(file)}:{node.lineno} leaves the package"
            base = here[:len(here) + 1 - node.level]
            named = (*base, *(node.module or "").split(".")) if node.module else base
            for path in [named] if node.module else [(*base, a.name) for a in node.names]:
                found.append((".".join(path), node.level, path[0]))
    return tuple(found)


def part_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "cli" if parts[0].startswith("cli") else ""


def test_the_walk_sees_the_package() -> None:
    names = {name_of(p) for p in package_files()}
    assert {"cli.py", "cache/encoder.py", "drifting/field.py", "stages/train.py", "stages/envs/metaworld.py"} <= names
    assert ("cache.store", 2, "cache") in imports(ROOT / "stages" / "train.py")
    assert ("transformers", 0, "") in imports(ROOT / "cache" / "qwen3vl.py")    # inside a function


def test_every_module_is_shipped() -> None:
    parts = [ROOT / name for name in ("cache", "drifting", "stages")]
    on_disk = {p for part in parts for p in part.rglob("*.py")} | set(ROOT.glob("*.py"))
    assert {name_of(p) for p in on_disk} == {name_of(p) for p in package_files()}


@pytest.mark.parametrize("part", ARROWS)
def test_arrows(part: str) -> None:
    parts = {"cache", "drifting", "stages", "cli"}
    allowed = parts - ARROWS[part] - {part}
    bad = [f"{name_of(file)} imports {module}" for file in package_files() if part_of(file) == part
           for module, level, first in imports(file) if level and first in allowed]
    assert not bad
    assert any(part_of(file) == part for file in package_files())


def test_imports_inside_the_package_are_relative() -> None:
    assert not [f"{name_of(file)} imports {module}" for file in package_files()
                for module, level, _ in imports(file) if not level and module.split(".")[0] == "dvla"]


@pytest.mark.parametrize("library", FENCES)
def test_fences(library: str) -> None:
    users = {name_of(file) for file in package_files() for module, level, _ in imports(file)
             if not level and module.split(".")[0] == library}
    inside = {user for user in users for fence in FENCES[library]
              if user == fence or (fence.endswith("/") and user.startswith(fence))}
    assert users == inside, f"{library} is imported outside its fence"
    if library not in UNUSED:
        without = {f for f in FENCES[library] if not f.endswith("/")} - users
        assert not without, f"{library} is not imported there any more; take the entry out"


def test_drifting_does_no_io() -> None:
    files = [f for f in package_files() if part_of(f) == "drifting"]
    assert files
    bad = [f"{name_of(f)} imports {m}" for f in files for m, level, _ in imports(f)
           if not level and m.split(".")[0] in IO_MODULES]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                bad += [f"{name_of(file)}:{node.lineno} calls {called}"] * (called in IO_CALLS)
    assert not bad


def test_the_command_starts_light(tmp_path: Path) -> None:
    code = f"import sys, dvla.cli; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.strip() == ""
