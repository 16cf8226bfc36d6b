"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A file is records one after another: length (uint64, little-endian), checksum of those 8 bytes (uint32), that many bytes
of data, checksum of the data (uint32). A checksum is crc32c rotated right by 15 bits plus a constant ("masked"). There
is no table of contents, so an index is made by walking the lengths. A file compressed with gzip or zlib is unpacked on
the way, in memory that does not grow with it. Letters: N records of a file.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from ..episode import CorruptEpisode
from ..location import absence
from .packed import Damaged, Unpacked, compression_of

_HEADER = struct.Struct("<QI")  # length, its checksum
_FOOTER = struct.Struct("<I")  # checksum of the data
_FRAME_NBYTES = _HEADER.size + _FOOTER.size


@dataclass(frozen=True)
class Index:
    """Where the records of a file begin."""

    offsets: np.ndarray  # [N + 1] int64: first byte of each complete record, and the end of the last
    damage: str  # why the walk ended before the end of the file; "" when it did not
    unpacked: Unpacked | None = None  # of a compressed file: offsets are of what it holds

    def __len__(self) -> int:
        return len(self.offsets) - 1


def index_records(path: Path, where: str) -> Index:
    """The records of a file. Only lengths are read, and kept for as long as the file's size and time stay the same;
    each is checked against its checksum and the file's size, so a cut file or a bogus length ends the index with its
    `damage`. `CorruptEpisode`, beginning with `where`, when the file cannot be read at all."""
    try:
        stat = path.stat()
        version = str(path), stat.st_size, stat.st_mtime_ns
        found = _walk(*version)
        return _walk_packed(*version) if found is None else found
    except OSError as error:
        reason = f"{where}: {path.name} cannot be read ({error.strerror or error})"
        raise CorruptEpisode(reason, "unreadable-file") from None


def read_record(path: Path, number: int, where: str) -> bytes:
    """The data of record `number` (from 0), its checksum verified. `CorruptEpisode`, beginning with `where` and naming
    file and record, when the file ends or is damaged before or in it."""
    index = index_records(path, where)
    if number >= len(index):
        if reason := absence(path):
            raise CorruptEpisode(f"{where}: {path.name} {reason}", "unreadable-file")
        reason = index.damage or f"it ends after {len(index)} records"
        raise CorruptEpisode(f"{where}: record {number} of {path.name} cannot be found: {reason}", "unreadable-file")
    first, last = int(index.offsets[number]), int(index.offsets[number + 1])
    try:
        if index.unpacked:
            data = index.unpacked.read(first + _HEADER.size, last)
        else:
            with path.open("rb") as file:
                file.seek(first + _HEADER.size)
                data = file.read(last - first - _HEADER.size)
    except (OSError, Damaged) as error:
        said = getattr(error, "strerror", None) or error
        reason = f"{where}: record {number} of {path.name} cannot be read ({said})"
        raise CorruptEpisode(reason, "unreadable-file") from None
    data, footer = data[: -_FOOTER.size], data[-_FOOTER.size :]
    if len(data) != last - first - _FRAME_NBYTES or _FOOTER.pack(_checksum(data)) != footer:
        reason = f"{where}: record {number} of {path.name} is damaged: its checksum does not match"
        raise CorruptEpisode(reason, "unreadable-file")
    return data


def parse_example(data: bytes, where: str) -> Mapping[str, Any]:
    """Feature name → message of a serialized tf.train.Example; else `CorruptEpisode`. See `values_of`."""
    try:
        return _EXAMPLE.FromString(data).features.feature
    except message.DecodeError:
        raise CorruptEpisode(f"{where}: its record is not a tf.train.Example", "unreadable-file") from None


def values_of(features: Mapping[str, Any], name: str, kind: str, where: str) -> Any:
    """The flat list of one feature: `kind` "float" gives float32 [n], "int64" int64 [n], "bytes" a list of bytes. An
    empty list is written without a kind. `CorruptEpisode` when the feature is absent or of another kind."""
    if name not in features:  # asking a protobuf map for an absent key would add it
        raise CorruptEpisode(f"{where}: feature '{name}' is missing from its record")
    feature = features[name]
    found = feature.WhichOneof("kind")
    if found not in (None, f"{kind}_list"):
        raise CorruptEpisode(f"{where}: feature '{name}' is a {found}, {kind}_list was expected")
    values = getattr(feature, f"{kind}_list").value
    return list(values) if kind == "bytes" else np.array(values, np.float32 if kind == "float" else np.int64)


@functools.lru_cache(maxsize=4096)
def _walk(path: str, size: int, mtime_ns: int) -> Index | None:
    """The index of a file of `size` bytes, None for one that is compressed; the time is there to tell one version of
    the file from another."""
    offsets, damage, here = [0], "", 0
    with open(path, "rb", buffering=0) as file:
        while here < size and not damage:
            header = os.pread(file.fileno(), _HEADER.size, here)
            number = len(offsets) - 1
            length, damage = _length(header, number, here)
            if damage and not here and (packed := compression_of(header)):
                if packed in ("gzip", "zlib"):
                    return None
                damage = f"it is compressed with {packed}, which is not read; decompress it (to the same name)"
            elif not damage and length > size - here - _FRAME_NBYTES:
                damage = _cut_short(number, length, size - here)
            elif not damage:
                here += length + _FRAME_NBYTES
                offsets.append(here)
    return Index(np.array(offsets, np.int64), damage)


@functools.lru_cache(maxsize=4)  # a few: each keeps places to unpack from
def _walk_packed(path: str, size: int, mtime_ns: int) -> Index:
    """The index of what a compressed file holds; made by unpacking it once."""
    unpacked = Unpacked(Path(path))
    offsets, damage, have, at = [0], "", bytearray(), 0  # have: the bytes from `at` on
    length = -1  # of the record that begins at offsets[-1], once its header was read
    try:
        for block in unpacked.blocks(learn=True):
            have += block
            while not damage:
                if length < 0 and offsets[-1] - at + _HEADER.size <= len(have):
                    first = offsets[-1] - at
                    length, damage = _length(bytes(have[first : first + _HEADER.size]), len(offsets) - 1, offsets[-1])
                if damage or length < 0 or offsets[-1] + length + _FRAME_NBYTES > at + len(have):
                    break
                offsets.append(offsets[-1] + length + _FRAME_NBYTES)
                length = -1
            if damage:
                break
            used = min(len(have), max(0, offsets[-1] - at) if length < 0 else len(have))
            at += used
            del have[:used]
    except Damaged as error:
        damage = str(error)
    left = at + len(have) - offsets[-1]
    if not damage and left:
        damage = _cut_short(len(offsets) - 1, length, left)
    return Index(np.array(offsets, np.int64), damage, unpacked)


def _length(header: bytes, number: int, at: int) -> tuple[int, str]:
    """(bytes of data of record `number`, why they are not known)."""
    if len(header) < _HEADER.size:
        return -1, f"the file is cut short in the header of record {number}"
    length, checksum = _HEADER.unpack(header)
    if checksum != _checksum(header[:8]):
        return -1, f"the length of record {number}, at byte {at}, is damaged, and nothing after it can be found"
    return length, ""


def _cut_short(number: int, length: int, left: int) -> str:
    if length < 0:
        return f"the file is cut short in the header of record {number}"
    return f"the file is cut short: record {number} claims {length} bytes, {max(0, left - _FRAME_NBYTES)} are left"


def _checksum(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _example_class() -> type[message.Message]:
    """tf.train.Example (tensorflow/core/example/*.proto): a map from name to one of three flat lists."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dvla/example.proto", package="dvla", syntax="proto3")

    def add(name: str, inside: Any = file.message_type) -> Any:
        inside.add(name=name)
        return inside[-1]

    def has(owner: Any, name: str, number: int, type: str, label: int = field.LABEL_OPTIONAL, **more: Any) -> None:
        scalar = {
            "bytes": field.TYPE_BYTES,
            "float": field.TYPE_FLOAT,
            "int64": field.TYPE_INT64,
            "string": field.TYPE_STRING,
        }
        typed = {"type": scalar[type]} if type in scalar else {"type": field.TYPE_MESSAGE, "type_name": f".dvla.{type}"}
        owner.field.add(name=name, number=number, label=label, **typed, **more)

    feature = add("Feature")
    feature.oneof_decl.add(name="kind")
    for number, kind in enumerate(("bytes", "float", "int64"), start=1):
        has(add(f"{kind}List"), "value", 1, kind, field.LABEL_REPEATED)
        has(feature, f"{kind}_list", number, f"{kind}List", oneof_index=0)
    features = add("Features")
    entry = add("FeatureEntry", features.nested_type)
    entry.options.map_entry = True
    has(entry, "key", 1, "string")
    has(entry, "value", 2, "Feature")
    has(features, "feature", 1, "Features.FeatureEntry", field.LABEL_REPEATED)
    has(add("Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()  # of its own: nothing another library registers can clash
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("dvla.Example"))


_EXAMPLE: Any = _example_class()
