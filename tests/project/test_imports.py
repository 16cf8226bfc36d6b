"""The house: arrows between rooms, fences around third parties, no circle; read from the source, as tables."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dvla
from support.package_source import arrows_between, circles, imports, name_of, package_files, room_of
from support.repository import ROOT

# Room → rooms whose files it may import besides its own and those of OPEN.
ARROWS: dict[str, set[str]] = {
    "errors.py": set(),
    "batch.py": set(),
    "common": set(),
    "drifting": set(),
    "cache/actions": set(),
    "cache/vlm": set(),
    "cache/readers": {"cache/actions"},
    "cache/store": {"cache/actions"},
    "cache/loader": {"cache/actions", "cache/readers", "cache/store", "cache/vlm"},
    "stages/policy": set(),
    "stages/data": set(),
    "stages/training": {"stages/policy"},
    "stages/simulation": {"stages/policy"},
    "stages/serving": {"stages/policy"},
    "stages/reports": {"stages/training", "stages/policy"},
    "stages/caching": {"stages/reports", "stages/training", "stages/policy"},
    "stages/experiments": {"stages/policy", "stages/simulation", "stages/training"},
}
# Part of the package → what each of its rooms may use besides.
OPEN: dict[str, set[str]] = {
    "errors.py": set(),
    "batch.py": {"errors.py"},
    "common": {"errors.py", "__init__.py"},
    "drifting": {"batch.py", "errors.py"},
    "cache": {"common", "batch.py", "errors.py"},
    "stages": {"cache", "drifting", "common", "batch.py", "errors.py", "__init__.py"},
}
ROOT_FILES = {"__init__.py", "batch.py", "cli.py", "errors.py", "py.typed"}
# Third party → files, or folders ending in "/", that may import it. An entry without a user is refused too.
FENCES = {
    "typer": {
        "cli.py",
        "common/",
        *(
            f"stages/{room}/cli.py"
            for room in (
                "caching",
                "caching/upkeep",
                "caching/transfer",
                "data",
                "experiments",
                "policy",
                "reports",
                "serving",
                "simulation",
                "training",
            )
        ),
    },
    "rich": {"common/", "stages/"},
    "transformers": {"cache/vlm/"},
    "flash_attn": {"cache/vlm/blocks.py", "drifting/attention.py"},
    "peft": {"cache/vlm/encoder.py", "cache/vlm/lora.py"},
    "lerobot": {"stages/policy/lerobot/", "stages/simulation/lerobot_writer.py"},
    "datasets": {"stages/simulation/lerobot_writer.py"},
    "metaworld": {"stages/simulation/envs/metaworld.py"},
    "mujoco": {"stages/simulation/envs/mujoco_render.py"},
    "mani_skill": {"stages/simulation/envs/maniskill.py"},
    "sapien": {"stages/simulation/envs/maniskill.py"},
    "rlbench": {"stages/simulation/envs/rlbench.py"},
    "pyrep": {"stages/simulation/envs/rlbench.py"},
    "isaacgym": {"stages/simulation/envs/isaac_worker.py"},
    "robosuite": {"stages/simulation/envs/robosuite.py"},
    "av": {"cache/readers/video.py", "common/mp4.py"},
    "zarr": {"cache/readers/replay_buffer/store.py"},
    "h5py": {"cache/readers/"},
    "dask": {"stages/caching/dask_cluster.py"},
    "distributed": {"stages/caching/dask_cluster.py", "stages/caching/slurm_cluster.py", "stages/caching/workers.py"},
    "dask_jobqueue": {"stages/caching/slurm_cluster.py"},
    "numcodecs": {"cache/store/codec.py"},
    "webdataset": {"cache/store/webdataset/tars.py"},
    "fsspec": {"cache/store/locations.py"},
    "pyvista": {"cache/readers/dexgraspnet/render.py"},
    "vtkmodules": {"cache/readers/dexgraspnet/render.py"},
    "pydantic": {"common/documents.py"},
    "wandb": {"stages/training/trackers/weights_and_biases.py"},
    "trackio": {"stages/training/trackers/trackio.py"},
    "deepspeed": {"stages/training/parallel/zero2.py"},
    "onnxruntime": {"stages/policy/graph.py"},
    "jinja2": {"stages/reports/html.py"},
    "rerun": {"stages/reports/rerun.py"},
    "websockets": {"stages/serving/"},
    "dvla_client": {"stages/serving/"},
}
# Modules through which pure mathematics could reach a file, the network or another process.
IO_MODULES = {
    "os",
    "io",
    "pathlib",
    "shutil",
    "tempfile",
    "json",
    "pickle",
    "yaml",
    "mmap",
    "glob",
    "subprocess",
    "socket",
    "urllib",
    "requests",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "PIL",
    "av",
    "zarr",
}
IO_CALLS = {"open", "load", "save", "memmap", "fromfile", "tofile", "loadtxt", "savetxt", "print"}
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "av",
    "pyarrow",
    "lerobot",
    "metaworld",
    "mujoco",
    "matplotlib",
    "numpy",
    "websockets",
)


def may_import(room: str, other: str) -> bool:
    part = room.split("/")[0]
    return room == other or other in ARROWS[room] or other in OPEN[part] or other.split("/")[0] in OPEN[part]


def test_the_walk_sees_the_package() -> None:
    names = {name_of(p) for p in package_files()}
    assert {
        "cli.py",
        "cache/vlm/encoder.py",
        "drifting/field.py",
        "stages/training/train.py",
        "stages/simulation/envs/metaworld.py",
    } <= names
    assert "cache/store/cache.py" in {i.file for i in imports(ROOT / "stages/training/train.py")}
    assert any(
        i.module.startswith("transformers") and not i.on_load for i in imports(ROOT / "cache/vlm/qwen3vl/load.py")
    )  # inside a function
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_every_import_leads_somewhere() -> None:
    """Those inside functions too, which no import of the package would notice."""
    assert not [
        f"{name_of(file)} imports {one.file}"
        for file in package_files()
        for one in imports(file)
        if one.file and not (ROOT / one.file).is_file()
    ]


def test_every_module_is_shipped() -> None:
    on_disk = {p for part in ("common", "cache", "drifting", "stages") for p in (ROOT / part).rglob("*.py")} | set(
        ROOT.glob("*.py")
    )
    assert {name_of(p) for p in on_disk} == {name_of(p) for p in package_files()}


def test_the_root_holds_what_it_should() -> None:
    assert {p.name for p in ROOT.glob("*.py")} | {"py.typed"} == ROOT_FILES


@pytest.mark.parametrize("room", ARROWS)
def test_arrows(room: str) -> None:
    files = [file for file in package_files() if room_of(name_of(file)) == room]
    assert files
    bad = [
        f"{name_of(file)} imports {one.file}"
        for file in files
        for one in imports(file)
        if one.file
        and one.file.count("/") > 0 + (one.file.split("/")[0] in ("cache", "stages"))
        and not may_import(room, room_of(one.file))
    ]
    assert not bad


def test_every_room_has_its_arrows() -> None:
    rooms = {room_of(name_of(file)) for file in package_files()}
    assert rooms - {"cache", "stages", "cli.py", "__init__.py", "stages/lerobot_plugin"} == set(ARROWS)


def test_the_root_imports_when_a_name_is_used() -> None:
    """`dvla.Policy` and the like may come from anywhere: their imports are for type checkers, and at run time lazy."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    loaded = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in loaded if isinstance(node, ast.ImportFrom) and node.level]
    checked = [i for i in imports(ROOT / "__init__.py") if i.file]
    assert {f"{module.replace('.', '/')}.py" for module in dvla._MODULES.values()} == {i.file for i in checked}


@pytest.mark.parametrize("by_room", [False, True], ids=["files", "rooms"])
def test_there_is_no_circle(by_room: bool) -> None:
    """Between files: imports when a file is loaded and those for type checking. Between rooms: those inside functions
    too. The root's own are lazy, so that `dvla.Policy` may come from a room that asks the root for its version."""
    arrows = arrows_between(by_room=by_room)
    del arrows["__init__.py"]
    assert circles(arrows) == []


def test_imports_inside_the_package_are_relative() -> None:
    assert not [
        f"{name_of(file)} imports {i.module}"
        for file in package_files()
        for i in imports(file)
        if i.module.split(".")[0] == "dvla"
    ]


@pytest.mark.parametrize("library", FENCES)
def test_fences(library: str) -> None:
    users = {name_of(file) for file in package_files() for i in imports(file) if i.module.split(".")[0] == library}
    inside = {
        user
        for user in users
        for fence in FENCES[library]
        if user == fence or (fence.endswith("/") and user.startswith(fence))
    }
    assert users == inside, f"{library} is imported outside its fence"
    without = {f for f in FENCES[library] if not any(user.startswith(f) for user in users)}
    assert not without, f"{library} is not imported there any more; take the entry out"


def test_the_client_is_a_package_of_its_own() -> None:
    """It is installed on robots without dvla: itself, the standard library and four small packages, nothing else."""
    files = sorted((ROOT / "client" / "dvla_client").glob("*.py"))
    assert {"client.py", "loop.py", "wire.py"} <= {file.name for file in files}
    allowed = {*sys.stdlib_module_names, "numpy", "websockets", "msgpack", "PIL"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.level == 0 and (node.module or "").split(".")[0] in allowed, file


def test_drifting_does_no_io() -> None:
    files = [f for f in package_files() if room_of(name_of(f)) == "drifting"]
    assert files
    bad = [
        f"{name_of(f)} imports {i.module}" for f in files for i in imports(f) if i.module.split(".")[0] in IO_MODULES
    ]
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
