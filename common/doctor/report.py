"""`dvla doctor --report`: what a report of a bug needs, as Markdown, without secrets."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ... import __version__
from ..packages import version_of
from ..text import printable, public, size
from .faults import last_fault

PACKAGES = [
    "torch",
    "torchvision",
    "numpy",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "av",
    "pyarrow",
    "h5py",
    "zarr",
    "numcodecs",
    "webdataset",
    "fsspec",
    "distributed",
    "pydantic",
    "typer",
    "click",
    "rich",
    "lerobot",
    "mujoco",
    "metaworld",
    "gymnasium",
    "mani-skill",
    "gym-aloha",
    "robosuite",
    "flash-attn",
    "deepspeed",
    "onnx",
    "onnxruntime",
    "websockets",
    "wandb",
    "rerun-sdk",
]
VARIABLES = [
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_JOB_NUM_NODES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "MUJOCO_GL",
    "PYOPENGL_PLATFORM",
    "VK_ICD_FILENAMES",
    "TMPDIR",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "LANG",
    "LC_ALL",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "DVLA_TRACEBACK",
    "WANDB_MODE",
]
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_SECRETS = (
    re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat|sk|xox[abp]|glpat|wandb_v1)[-_][\w-]{8,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"),
    re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"),  # a JSON web token
    re.compile(r"\b[0-9a-fA-F]{32,}\b"),  # keys of W&B and others; also hashes, which nobody needs here
    re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),  # mail addresses
)
_ASSIGNED = re.compile(
    r"((?:token|secret|passw(?:or)?d|pwd|credentials?|authorization|(?:api|access|private)[-_]?key)['\"]?"
    r"(?:\s*[=:]\s*|\s+)(?:(?:Bearer|Basic|Api-Key)\s+)?)[^\s,;)]+",
    re.IGNORECASE,
)


def report() -> str:
    """The report as Markdown."""
    rows = [("dvla", __version__), ("Python", f"{platform.python_implementation()} {platform.python_version()}")]
    rows += [("system", platform.platform()), ("processor", _processor()), ("memory", _memory()), *_gpu(), *_space()]
    packages = [(name, version) for name in PACKAGES if (version := version_of(name))]
    variables = [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    parts = ["# dvla report", _table(rows), "## Packages", _table(packages)]
    parts += ["## Environment variables", _table(variables) if variables else "none of those that matter is set"]
    parts += ["## Last unexpected error", *_fault()]
    return scrubbed("\n\n".join(parts)) + "\n"


def scrubbed(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without secrets, and without the names of users, their home folders and this machine."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    text = _ASSIGNED.sub(r"\1…", public(text))
    for secret in _SECRETS:
        text = secret.sub("…", text)
    home = os.path.expanduser("~")
    homes = rf"{re.escape(home if len(home) > 1 else '/root')}|/root|(?:/home|/Users|/export/home)/[^/\s'\":|]+"
    text = re.sub(rf"(?<![\w.~-])(?:{homes})(?![\w-])", "~", text)
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        text = _without(text, getpass.getuser(), "USER")
    host = socket.gethostname()
    return printable(_without(_without(text, host, "HOST"), host.partition(".")[0], "HOST"))


def _without(text: str, name: str, word: str) -> str:
    return re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text) if len(name) > 2 and name != "root" else text


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [(name, " ".join(value.split()).replace("|", "\\|")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _memory() -> str:
    with contextlib.suppress(OSError):
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        return f"{size(int(found['MemTotal']) << 10)}, {size(int(found['MemAvailable']) << 10)} available"
    return "unknown"


def _gpu() -> Iterator[tuple[str, str]]:
    """torch's build, and the GPUs as their driver names them."""
    try:
        import torch

        build = f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        yield "torch", f"{build}; CUDA {'works' if torch.cuda.is_available() else 'is not available'}"
    except Exception as error:  # a broken installation may raise anything, and belongs in the report
        yield "torch", f"cannot be imported: {type(error).__name__}: {error}"
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"none that nvidia-smi knows ({type(error).__name__})"
    yield from (("GPU", line) for line in said.splitlines() or ["none"])


def _space() -> Iterator[tuple[str, str]]:
    """Free space where dvla writes."""
    for name, find in {
        "working": os.getcwd,
        "temporary": tempfile.gettempdir,
        "shared memory": lambda: "/dev/shm",
    }.items():
        with contextlib.suppress(OSError):
            found = shutil.disk_usage(find())
            yield f"{name} folder", f"{size(found.free)} free of {size(found.total)}"


def _fault() -> list[str]:
    """The newest traceback that was kept; the end of a long one."""
    path = last_fault()
    if path is None:
        return ["none was kept"]
    try:
        return [f"of {path.name}", f"```text\n{path.read_text(errors='replace')[-20_000:].replace('```', '~~~')}\n```"]
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]
