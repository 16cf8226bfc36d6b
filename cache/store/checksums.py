"""Checksums of a finished cache's files against its manifest."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...common.files import file_crc32c
from ...common.progress import Count
from ...errors import UserError
from .codec import Compression
from .manifest import Files, read_manifest
from .shard_reader import ShardFiles
from .shard_writer import index_nbytes

_SHARD = re.compile(r"(?P<array>.+)/c(/\d+)+")


def verify_checksums(path: Path | str, progress: Count | None = None) -> list[str]:
    """Reread every file of a finished cache; one line per file that is missing, truncated or altered.

    `progress(done bytes, all bytes)` is called after each file. `UserError` as `Cache.open`.
    """
    problems = damaged_files(Path(path), read_manifest(Path(path))["files"], progress)
    return [f"{name}: {problem}" for name, problem in problems.items()]


def damaged_files(path: Path, files: Files, progress: Count | None = None) -> dict[str, str]:
    """Name → problem, of those of `files` that are not as they were written."""
    problems, done, total = {}, 0, sum(entry["bytes"] for entry in files.values())
    document = functools.cache(_array_document)
    for name, entry in sorted(files.items()):
        try:
            nbytes, crc = file_crc32c(path / name)
        except OSError as error:
            problems[name] = f"cannot be read ({error.strerror})"
        else:
            if nbytes != entry["bytes"]:
                problems[name] = f"{nbytes} bytes, {entry['bytes']} were written"
            elif crc != entry["crc32c"]:
                problems[name] = f"altered (crc32c {crc:08x}, {entry['crc32c']:08x} was written)"
            elif (shard := _SHARD.fullmatch(name)) and (
                found := _index_problem(path / name, document(path / shard["array"]))
            ):
                problems[name] = found
        done += entry["bytes"]
        if progress:
            progress(done, total)
    return problems


def _array_document(folder: Path) -> dict[str, Any] | None:
    """The metadata of the array in a folder; None where it is damaged, which its own checksum tells."""
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
        return document if document["node_type"] == "array" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index_problem(path: Path, document: dict[str, Any] | None) -> str | None:
    """What is wrong with the index of a shard, or None.

    The index ends in its own crc32c, and a crc32c over data that ends in its own crc32c does not depend on the data:
    the file's checksum is blind to it. So the index is compared with how dvla writes: chunks one after the other, from
    byte 0, and compressed ones are decoded.
    """
    if document is None:
        return None
    shard = document["chunk_grid"]["configuration"]["chunk_shape"]
    sharding = document["codecs"][0]["configuration"]
    chunk, names = sharding["chunk_shape"], [codec["name"] for codec in sharding["codecs"]]
    dtype, chunks = np.dtype(document["data_type"]), math.prod(shard) // math.prod(chunk)
    record, packed = math.prod(chunk) * dtype.itemsize, [n for n in names if n != "bytes"]
    try:
        opened = ShardFiles(limit=1).get(str(path), chunks, 0 if packed else record)
    except UserError:
        return "its index is damaged"
    wrong, nbytes = "its index does not give the chunks in the order in which they were written", path.stat().st_size
    if opened.index is None:
        return None if opened.count * record + index_nbytes(chunks) == nbytes else wrong
    index, count = opened.index, int((opened.index[:, 0] >= 0).sum())
    ends = np.cumsum(index[:count, 1])
    in_order = (index[count:] == -1).all() and (index[:count, 0] == np.concatenate([[0], ends[:-1]])[:count]).all()
    if not packed or not in_order or ends[-1:].sum() + index_nbytes(chunks) != nbytes:
        return wrong
    codec, target = Compression("zstd" if "zstd" in packed else "lz4", dtype.itemsize), memoryview(bytearray(record))
    data = np.memmap(path, np.uint8, "r")
    try:
        for offset, size in index[:count].tolist():
            codec.decode(bytes(data[offset : offset + size]), target)
    except ValueError as error:
        return f"its index cuts a compressed chunk in two ({error})"
    return None
