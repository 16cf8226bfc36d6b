"""Checksums of a finished cache's files against its manifest."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...common.documents import read_json
from ...common.files import file_crc32c
from ...common.progress import Count
from ...errors import UserError
from .codec import Compression
from .manifest import MANIFEST, Files, describes, plan_of, read_fingerprint, read_manifest
from .shard_reader import ShardFiles
from .shard_writer import index_nbytes
from .zarr_format import ArrayForm, file_names

_SHARD = re.compile(r"(?P<array>.+)/c(/\d+)+")


def verify_checksums(path: Path | str, progress: Count | None = None) -> list[str]:
    """Reread every file of a finished cache; one line per file that is missing, truncated or altered.

    `progress(done bytes, all bytes)` is called after each file. `UserError` as `Cache.open`.
    """
    path = Path(path)
    manifest, fingerprint = read_manifest(path), read_fingerprint(path)
    problems = damaged_files(path, manifest["files"], progress)
    return [f"{name}: {problem}" for name, problem in [*problems.items(), *incomplete(path, manifest, fingerprint)]]


def incomplete(path: Path, manifest: dict[str, Any], fingerprint: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, problem) of what the manifest of a cache lists or says otherwise than a build of its fingerprint would."""
    plan = plan_of(fingerprint, path)
    wanted, listed = set(file_names(plan)), manifest["files"].keys()
    found = [(name, f"{MANIFEST} does not list it") for name in sorted(wanted - listed)]
    found += [(name, "it is no file of the cache, and listed") for name in sorted(listed - wanted)]
    return found + ([] if describes(manifest, plan, fingerprint) else [(MANIFEST, "it is not what the build wrote")])


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
            elif (
                name.endswith("/zarr.json")
                and (found := _metadata_problem(path / name))
                or (shard := _SHARD.fullmatch(name))
                and (found := _index_problem(path / name, document(path / shard["array"])))
            ):
                problems[name] = found
        done += entry["bytes"]
        if progress:
            progress(done, total)
    return problems


def _array_document(folder: Path) -> dict[str, Any] | None:
    """The metadata of the array in a folder; None where it is damaged, which its own checksum tells."""
    try:
        return read_json(folder / "zarr.json", ArrayForm)
    except UserError:
        return None


def _metadata_problem(file: Path) -> str | None:
    """What is wrong with the metadata of a group or array whose checksum is right, or None."""
    try:
        if read_json(file).get("node_type") != "group":
            read_json(file, ArrayForm)
        return None
    except UserError as error:
        return str(error)


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
    dtype, (chunks, rest) = np.dtype(document["data_type"]), divmod(math.prod(shard), math.prod(chunk))
    if rest or index_nbytes(chunks) > path.stat().st_size or names[1:] not in ([], ["zstd"], ["blosc"]):
        return "the metadata of its array says other chunks"
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
    codec = Compression("zstd" if "zstd" in packed else "lz4", dtype.itemsize)
    try:
        data, target = np.memmap(path, np.uint8, "r"), memoryview(bytearray(record))
        for offset, size in index[:count].tolist():
            codec.decode(bytes(data[offset : offset + size]), target)
    except (ValueError, MemoryError) as error:
        return f"its index cuts a compressed chunk in two ({error})"
    return None
