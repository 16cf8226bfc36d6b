"""Seeded damage to a cache, an export or a part of one: its documents, tables, indexes of shards, and kinds of files.

Half of the time the checksums are made anew, so that the readers behind them are reached: a cache from elsewhere brings
its own.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import socket
import struct
import tarfile
from pathlib import Path

import numpy as np

from dvla.common.files import crc32c
from fuzz.mutations import ANY, Mutation, change_json, json_lines, places_of

OFTEN = ("manifest.json", "fingerprint.json", "index.json", "attributes", ".tar", "tables")
HUGE = (-1, 0, 1, 2, 10**6, 10**9, 2**31, 10**12, 2**62, 2**63 - 1)


def damage(root: Path, rng: random.Random) -> Mutation:
    """Damage a file below `root`, now and then two."""
    first = _damage(root, rng)
    if rng.random() > 0.15 or not _files(root):
        return first
    second = _damage(root, rng)
    return Mutation(first.file, f"{first.what}; {second.file}: {second.what}", first.sound or second.sound)


def _damage(root: Path, rng: random.Random) -> Mutation:
    files = _files(root)
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(_kind(path.relative_to(root)), []).append(path)
    weights = [3 if kind in OFTEN else 1 for kind in kinds]
    path = rng.choice(kinds[rng.choices(list(kinds), weights)[0]])
    name, how = path.relative_to(root).as_posix(), rng.random()
    if how < 0.12:
        return Mutation(name, _other_kind(path, files, rng))
    try:
        change = _structured(path, rng) if how < 0.72 else None
    except Exception:  # it is none of its kind since the first damage
        change = None
    what = change or rng.choice(ANY)(path, rng, files)
    sound = path.is_file() and rng.random() < 0.5 and _reseal(root, path, rng)
    return Mutation(name, what + ("; checksums made anew" if sound else ""), bool(sound))


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".lock" and p.parent.name != ".locks")


def _kind(name: Path) -> str:
    parts = name.parts
    if name.name == "zarr.json":
        return "attributes" if len(parts) == 2 else "zarr.json" if len(parts) == 1 else f"array {len(parts)}"
    if "c" in parts:
        return "features" if "features" in parts or "scales" in parts else "tables"
    return name.suffix if name.suffix == ".tar" else re.sub(r"\d+", "0", name.name)


def _structured(path: Path, rng: random.Random) -> str | None:
    """Another sound file of its kind; None where there is none."""
    if path.suffix == ".jsonl":
        return json_lines(path, rng) if path.stat().st_size else None
    if path.suffix == ".json":
        text, what = change_json(path.read_text(), rng) if rng.random() < 0.7 else _own_json(path.read_text(), rng)
        path.write_text(text)
        return what
    if path.suffix == ".tar":
        return _tar(path, rng)
    return _table(path, rng) if "c" in path.parts else None


def _own_json(text: str, rng: random.Random) -> tuple[str, str]:
    """A change that only a cache's documents invite: sizes, dtypes, names, keys."""
    document = json.loads(text)
    places = places_of(document)
    if not places:
        return text, "nothing"
    wanted = rng.choice((int, str, list, dict))
    parent, key = rng.choice([p for p in places if type(p[0][p[1]]) is wanted] or places)
    old = parent[key]
    if isinstance(old, int):
        parent[key] = rng.choice((*HUGE, old + 1, old - 1, old * 2, float(old), bool(old), str(old)))
    elif isinstance(old, str):
        parent[key] = rng.choice(
            (
                "object",
                "|O",
                "float64",
                "int16",
                "../../x",
                "/etc/passwd",
                old.upper(),
                f"{old}.aug1",
                "a/b",
                "",
                "x" * 300,
            )
        )
    elif isinstance(old, list):
        parent[key] = rng.choice((old[::-1], old + old, old[:-1], [*old, -1], [10**12] * max(1, len(old)), old[:1] * 9))
    elif isinstance(old, dict) and old:
        gone = rng.choice(sorted(old))
        value = old.pop(gone)
        new = rng.choice((f"{gone}x", gone.upper(), "", "../x", gone.replace("e", "é")))
        old[new] = value
        return json.dumps(document), f"{gone!r} of {key!r} renamed to {new!r}"
    return json.dumps(document), f"{key!r}: {str(old)[:40]} is {str(parent[key])[:60]}"


def _table(path: Path, rng: random.Random) -> str:
    """Another value in a table, or another index of a shard, with its right checksum."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5 or len(data) < 40:
        at = rng.randrange(max(1, len(data) // 8)) * 8
        value = rng.choice((*HUGE, -(2**63)))
        data[at : at + 8] = struct.pack("<q", value) if rng.random() < 0.7 else struct.pack("<d", float("nan"))
        path.write_bytes(data)
        return f"{value} at byte {at}"
    chunks = rng.choice((1, 2, 8))
    size = 16 * chunks + 4
    start = max(0, len(data) - size)
    at = start + 8 * rng.randrange(2 * chunks)
    value = rng.choice((0, 1, 7, len(data), 2**31, 2**62, 2**63, 2**64 - 1))
    data[at : at + 8] = struct.pack("<Q", value)
    data[-4:] = struct.pack("<I", crc32c(bytes(data[start:-4])))
    path.write_bytes(data)
    return f"{value} at byte {at} of an index of {chunks}"


def _tar(path: Path, rng: random.Random) -> str:
    """A member changed, renamed, removed or given twice."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    at = rng.randrange(len(members))
    name, data = members[at]
    how = rng.choice(("change", "change", "change", "rename", "remove", "twice"))
    if how == "change" and name.endswith("json"):
        text, how = change_json(data.decode(), rng) if rng.random() < 0.7 else _own_json(data.decode(), rng)
        members[at] = name, text.encode(errors="replace")
    elif how == "change":
        loaded = np.load(io.BytesIO(data))
        how, array = rng.choice(
            (
                ("no rows", loaded[:0]),
                ("text", np.array(["a"])),
                ("objects", np.array([None, {}], object)),
                ("one axis more", loaded[None]),
                ("float64", loaded.astype(np.float64)),
                ("integers", loaded.astype(np.int64)),
                ("huge", np.full(loaded.shape, 10**12 if loaded.dtype.kind == "i" else 1e4, loaded.dtype)),
                ("negative", np.full(loaded.shape, -1).astype(loaded.dtype)),
            )
        )
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        data = buffer.getvalue()
        if rng.random() < 0.2:
            data, how = data.replace(str(array.shape).encode(), b"(1000000000000,)", 1), "a header of 10^12"
        members[at] = name, data
    elif how == "rename":
        members[at] = rng.choice(("../x", "/etc/x", name.upper(), f"{name}x", "")), data
    elif how == "remove":
        del members[at]
    else:
        members.insert(at, (name, data[:-1] + b"x"))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return f"{name}: {how}"


def _other_kind(path: Path, files: list[Path], rng: random.Random) -> str:
    """Something else in the place of the file, or of a folder above it."""
    if rng.random() < 0.2 and path.parent.name not in ("x",) and path.parents[1].name != "":
        folder = path.parent
        shutil.rmtree(folder)
        path = folder
    elif path.exists():
        path.unlink()
    what = rng.choice(
        ("a folder", "a pipe", "a pipe", "a socket", "itself", "/dev/zero", "/etc/passwd", "file", "nothing")
    )
    if what == "a folder":
        path.mkdir()
        (path / "x").write_bytes(b"x")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a socket":
        here = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif what == "nothing":
        path.write_bytes(b"")
    else:
        others = [f for f in files if f.exists() and f != path]
        target = {"itself": path, "file": rng.choice(others or [path])}.get(what, Path(what))
        path.symlink_to(target)
        what = f"a link to {target.name}"
    return f"replaced by {what}{' (the folder)' if not path.suffix else ''}"


def _reseal(root: Path, path: Path, rng: random.Random) -> bool:
    """Write the file's size and checksum where the cache or export keeps them; whether there is such a place."""
    data, name = path.read_bytes(), path.relative_to(root).as_posix()
    entry = {"bytes": len(data), "crc32c": crc32c(data)}
    done = False
    index = root / "index.json"
    holders = [root / "manifest.json", *sorted((root / ".commits").rglob("*.json"))] if not index.exists() else [index]
    for holder in holders:
        try:
            document = json.loads(holder.read_text())
            if holder == index:
                for tar in (document["dvla"]["meta"], *document["shardlist"], *document["dvla"]["quarantine"]):
                    if tar["url"] == name:
                        tar |= {"filesize": len(data), "crc32c": crc32c(data)}
                        done = True
            elif name in document["files"] and (holder.name == "manifest.json" or rng.random() < 0.7):
                document["files"][name] = entry
                done = True
            holder.write_text(json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
        except Exception:  # it is what was damaged
            continue
    return done
