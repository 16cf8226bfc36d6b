"""setuptools' build backend, whose wheels also install the metadata of a distribution `lerobot_policy_dvla`.

LeRobot finds plug-ins by the names of installed distributions alone, and nobody should have to install a second one.
So a wheel of dvla, an editable one too, carries that distribution's folder as data; it is removed with dvla.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not wrapped

NAME = "lerobot_policy_dvla"


def metadata(version: str) -> dict[str, str]:
    """Files of the distribution's folder `NAME-VERSION.dist-info`.

    No RECORD: with one, `uv sync` would remove a distribution that nothing asks for. So it warns and leaves it."""
    return {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n"
        "Summary: LeRobot's name for the policies of dvla, which installs it\nRequires-Dist: dvla\n",
        "INSTALLER": "dvla\n",
        "top_level.txt": "",
    }


def build_wheel(wheel_directory: str, *args: Any, **settings: Any) -> str:
    return _with_plugin(wheel_directory, build_meta.build_wheel(wheel_directory, *args, **settings))


def build_editable(wheel_directory: str, *args: Any, **settings: Any) -> str:
    return _with_plugin(wheel_directory, build_meta.build_editable(wheel_directory, *args, **settings))


def _with_plugin(folder: str, wheel: str) -> str:
    """Add the metadata to a wheel, and to its list of files, which stays the last one."""
    path, version = Path(folder, wheel), wheel.split("-")[1]
    part = path.with_suffix(".part")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as new:
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        lines = old.read(record).decode().splitlines()
        for entry in old.infolist():
            if entry.filename != record:
                new.writestr(entry, old.read(entry))
        for name, text in metadata(version).items():
            file = f"dvla-{version}.data/purelib/{NAME}-{version}.dist-info/{name}"
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{file},sha256={digest},{len(text)}")
            new.writestr(file, text)
        new.writestr(record, "\n".join(lines) + "\n")
    part.replace(path)
    return wheel
