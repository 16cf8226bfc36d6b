"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A file is records one after another: length (uint64, little-endian), checksum of those 8 bytes (uint32), that many bytes
of data, checksum of the data (uint32). A checksum is crc32c rotated right by 15 bits plus a constant ("masked"). There
is no table of contents, so an index is made by walking the lengths. Letters: N records of a file.
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

_HEADER = struct.Struct("<QI")  # length, its checksum
_FOOTER = struct.Struct("<I")  # checksum of the data
_FRAME_NBYTES = _HEADER.size + _FOOTER.size


@dataclass(frozen=True)
class Index:
    """Where the records of a file begin."""

    offsets: np.ndarray  # [N + 1] int64: first byte of each complete record, and the end of the last
    damage: str  # why the walk ended before the end of the file; "" when it did not

    def __len__(self) -> int:
        return len(self.offsets) - 1


def index_records(path: Path, where: str) -> Index:
    """The records of a file. Only lengths are read, and kept for as long as the file's size and time stay the same;
    each is checked against its checksum and the file's size, so a cut file or a bogus length ends the index with its
    `damage`. `CorruptEpisode`, beginning with `where`, when the file cannot be read at all."""
    try:
        stat = path.stat()
        return _walk(str(path), stat.st_size, stat.st_mtime_ns)
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
        with path.open("rb") as file:
            file.seek(first + _HEADER.size)
            data = file.read(last - first - _HEADER.size)
    except OSError as error:
        reason = f"{where}: record {number} of {path.name} cannot be read ({error.strerror or error})"
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
def _walk(path: str, size: int, mtime_ns: int) -> Index:
    """The index of a file of `size` bytes; the time is there to tell one version of the file from another."""
    offsets, damage, here = [0], "", 0
    with open(path, "rb", buffering=0) as file:
        while here < size:
            header = os.pread(file.fileno(), _HEADER.size, here)
            number, left = len(offsets) - 1, size - here
            if len(header) < _HEADER.size:
                damage = f"the file is cut short in the header of record {number}"
                break
            length, checksum = _HEADER.unpack(header)
            if checksum != _checksum(header[:8]):
                damage = f"the length of record {number}, at byte {here}, is damaged, and nothing after it can be found"
                break
            if length > left - _FRAME_NBYTES:
                rest = max(0, left - _FRAME_NBYTES)
                damage = f"the file is cut short: record {number} claims {length} bytes, {rest} are left"
                break
            here += length + _FRAME_NBYTES
            offsets.append(here)
    return Index(np.array(offsets, np.int64), damage)


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
