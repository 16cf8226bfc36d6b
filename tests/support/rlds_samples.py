"""Small tfds folders with RLDS episodes, written without tfds, TensorFlow or protobuf: the wire format by hand.

Layout: github.com/tensorflow/datasets (core/naming.py, core/example_serializer.py, core/proto/feature.proto) and
github.com/tensorflow/tensorflow (core/lib/io/record_writer.cc, core/example/*.proto). `toy` has every kind of feature
the reader knows; `rt1` has the features of tfds' fractal20220817_data.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers import Source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode

SPLITS = {"train": (3, 2), "val": (2,)}  # split → records of each shard
EPISODES = 7
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
VIEWS = {"front": ("jpeg", 24, 32), "wrist": ("png", 16, 20)}  # name → encoding, height, width
NO_VIEWS = {"front_depth": "uint8", "range": "uint16"}  # pictures that are depth by name, and by type
TASKS = ("open the drawer", "close it", "push the puck")

_CRC = []
for _n in range(256):
    for _ in range(8):
        _n = _n >> 1 ^ (0x82F63B78 if _n & 1 else 0)  # Castagnoli, reflected
    _CRC.append(_n)


def masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def frame(data: bytes, length: int | None = None) -> bytes:
    """One TFRecord; `length` is written in place of the true one."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + struct.pack("<I", masked_crc(header)) + data + struct.pack("<I", masked_crc(data))


def varint(value: int) -> bytes:
    value, out = value % 2**64, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tagged(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: Mapping[str, Any]) -> bytes:
    """A serialised tf.train.Example: lists of bytes, float arrays and integer arrays by name."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            kind = tagged(1, b"".join(tagged(1, v) for v in values))
        elif values.dtype.kind == "f":
            kind = tagged(2, tagged(1, values.astype("<f4").tobytes()))
        else:
            kind = tagged(3, tagged(1, b"".join(varint(int(v)) for v in values.ravel())))
        entries += tagged(1, tagged(1, name.encode()) + tagged(2, kind))
    return tagged(1, entries)


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the length-delimited and varint fields of a protobuf message, by hand."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(data):
        tag, at = number(at)
        size, at = number(at)
        if tag & 7 == 0:
            yield tag >> 3, size
        else:
            yield tag >> 3, data[at : at + size]
            at += size


def leaf(kind: str, *shape: int | None, dtype: str = "float32", **more: str) -> dict[str, Any]:
    """One feature of features.json."""
    sizes = {"dimensions": [str(-1 if n is None else n) for n in shape]} if shape else {}
    content = {} if kind == "text" else {"shape": sizes, "dtype": dtype, **more}
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}_feature.{kind.title()}", kind: content}


def tree(features: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: v if "pythonClassName" in v else tree(v) for k, v in features.items()}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": nested},
    }


def write(
    root: Path,
    name: str,
    features: Mapping[str, Any],
    records: Sequence[bytes],
    version: str = "1.0.0",
    splits: Mapping[str, Sequence[int]] = SPLITS,
    template: str | None = TEMPLATE,
    metadata: Mapping[str, Any] | None = None,
    pack: Callable[[bytes], bytes] = bytes,
) -> Path:
    """A version's folder; `records` in the order of splits and shards. A template of None is left out of the JSON.
    `metadata`: features of the episode; `pack` compresses a shard."""
    folder = root / name / version
    folder.mkdir(parents=True)
    steps = {
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": tree(features), "length": "-1"},
    }
    (folder / "features.json").write_text(json.dumps(tree({"steps": steps, "episode_metadata": tree(metadata or {})})))
    info = {"fileFormat": "tfrecord", "name": name, "version": version, "splits": []}
    left = list(records)
    for split, lengths in splits.items():
        named = {} if template is None else {"filepathTemplate": template}
        info["splits"].append({"name": split, "shardLengths": [str(n) for n in lengths], "numBytes": "1", **named})
        for i, length in enumerate(lengths):
            index, count = f"{i:05d}", f"{len(lengths):05d}"
            relative = (template or TEMPLATE).format(
                DATASET=name,
                SPLIT=split,
                FILEFORMAT="tfrecord",
                SHARD_INDEX=index,
                NUM_SHARDS=count,
                SHARD_X_OF_Y=f"{index}-of-{count}",
            )
            (folder / relative).parent.mkdir(exist_ok=True)
            (folder / relative).write_bytes(pack(b"".join(frame(r) for r in left[:length])))
            left = left[length:]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


# --- toy: every kind of feature ------------------------------------------------------------------------------------


def picture(episode: int, step: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * ((x + 3 * step) % width) / width, 255 * ((y + 2 * episode) % height) / height
    return np.stack([red, green, np.full_like(red, 20 * step)], axis=-1).astype(np.uint8)


def encoded(array: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return out.getvalue()


def toy_values(episode: int) -> dict[str, Any]:
    """Step arrays, pictures and text of one episode by path below `steps`; each differs from every other episode's."""
    rng, length = np.random.default_rng(episode), 4 + episode % 3
    values = {
        "action/move": rng.uniform(-1, 1, (length, 3)).astype(np.float32),
        "action/grip": rng.integers(0, 2, length),
        "action/stop": rng.integers(-2, 3, (length, 2)),
        "observation/pose": rng.uniform(-1, 1, (length, 2, 2)).astype(np.float32),
        "observation/packed": rng.uniform(-1, 1, (length, 3)),
        "is_first": np.arange(length) == 0,
    }
    values |= {
        f"observation/{name}": [picture(episode, t, *size) for t in range(length)] for name, (_, *size) in VIEWS.items()
    }
    used = TASKS[:2] if episode == 3 else (TASKS[episode % 3],)
    return {**values, "language_instruction": [used[t * len(used) // length] for t in range(length)]}


def toy_record(episode: int, change: Callable[[dict[str, Any]], Any] = lambda f: None) -> bytes:
    """The record of an episode; `change` may alter the flat features before they are written."""
    features: dict[str, Any] = {}
    for name, values in toy_values(episode).items():
        if name.removeprefix("observation/") in VIEWS:
            values = [encoded(v, VIEWS[name.removeprefix("observation/")][0]) for v in values]
        elif name == "observation/packed":
            values = [zlib.compress(v.astype("<f8").tobytes()) for v in values]
        elif isinstance(values, list):
            values = [v.encode() for v in values]
        features[f"steps/{name}"] = values
    for name in NO_VIEWS:
        features[f"steps/observation/{name}"] = [encoded(np.full((4, 4), 700, np.uint16), "png")] * len(values)
    change(features)
    return example(features)


TOY_FEATURES = {
    "action": {
        "move": leaf("tensor", 3, encoding="none"),
        "grip": leaf("tensor", dtype="bool", encoding="none"),
        "stop": leaf("tensor", 2, dtype="int32", encoding="none"),
    },
    "observation": {
        "pose": leaf("tensor", 2, 2, encoding="none"),
        "packed": leaf("tensor", 3, dtype="float64", encoding="zlib"),
        **{name: leaf("image", h, w, 3, dtype="uint8", encodingFormat=kind) for name, (kind, h, w) in VIEWS.items()},
        **{name: leaf("image", 4, 4, 1, dtype=dtype, encodingFormat="png") for name, dtype in NO_VIEWS.items()},
        "open_end": leaf("tensor", None, encoding="none"),
        "waypoints": {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "sequence": {"feature": leaf("tensor", 2), "length": "-1"},
        },
    },
    "is_first": leaf("tensor", dtype="bool", encoding="none"),
    "language_instruction": leaf("text"),
}


def write_toy(
    root: Path,
    name: str = "toy",
    change: Mapping[int, Callable[[dict[str, Any]], Any]] | Callable[[dict[str, Any]], Any] | None = None,
    features: Mapping[str, Any] | None = None,
    **layout: Any,
) -> Path:
    """The toy dataset; `change` alters the features of single episodes, or of each."""
    each = change if callable(change) else None
    records = [toy_record(e, each or (change or {}).get(e, lambda f: None)) for e in range(EPISODES)]
    return write(root, name, features or TOY_FEATURES, records, **layout)


def toy_config(**changes: Any) -> DatasetConfig:
    fields = {
        "name": "t",
        "match": (),
        "embodiment": "gripper_delta_eef",
        "format": "rlds",
        "control_hz": 4.0,
        "action": (FieldSpec(drop=6),),
        "action_columns": ("action/move", "action/grip", "action/stop"),
        "state": (FieldSpec(drop=7),),
        "state_columns": ("observation/pose", "observation/packed"),
    }
    return DatasetConfig(**{**fields, **changes})


def shard(folder: Path, split: str = "train", number: int = 0) -> Path:
    """One of the toy dataset's files."""
    return folder / f"toy-{split}.tfrecord-{number:05d}-of-{len(SPLITS[split]):05d}"


def hashes(source: Source) -> dict[int, str | CorruptEpisode]:
    """Episode → its hash, or why it cannot be used. Every message is one line that begins with the episode's name."""
    found: dict[int, str | CorruptEpisode] = {}
    for number in source.episode_ids:
        try:
            episode = source.load(number)
            assert all(len(list(v.frames())) == v.length for v in episode.views)
            found[number] = episode.source_hash
        except CorruptEpisode as error:
            found[number] = error
            assert str(error).startswith(f"toy episode {number}: ") and "\n" not in str(error)
    return found


# --- rt1: the layout of fractal20220817_data -----------------------------------------------------------------------

RT1_WIDTHS = {
    "action/world_vector": 3,
    "action/rotation_delta": 3,
    "action/gripper_closedness_action": 1,
    "action/base_displacement_vector": 2,
    "action/base_displacement_vertical_rotation": 1,
    "observation/base_pose_tool_reached": 7,
    "observation/gripper_closed": 1,
}


def write_rt1(root: Path, name: str = "fractal20220817_data") -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Two episodes with the catalog's names, widths and types, and what was written into them."""
    features: dict[str, Any] = {
        "action": {"terminate_episode": leaf("tensor", 3, dtype="int32")},
        "observation": {
            "image": leaf("image", 256, 320, 3, dtype="uint8", encodingFormat="jpeg"),
            "natural_language_instruction": leaf("tensor", dtype="string"),
            "workspace_bounds": leaf("tensor", 3, 3),
        },
    }
    for path, width in RT1_WIDTHS.items():
        group, leaf_name = path.split("/")
        features[group][leaf_name] = leaf("tensor", width)
    written, records = [], []
    for episode in range(2):
        rng = np.random.default_rng(episode)
        values = {p: rng.uniform(-1, 1, (5, w)).astype(np.float32) for p, w in RT1_WIDTHS.items()}
        pose = values["observation/base_pose_tool_reached"]
        pose[:, 3:] *= np.sign(pose[:, 6:]) / np.linalg.norm(pose[:, 3:], axis=1, keepdims=True)
        written.append(values)
        flat: dict[str, Any] = {f"steps/{p}": v for p, v in values.items()}
        flat["steps/action/terminate_episode"] = np.tile([0, 1, 0], 5)
        flat["steps/observation/natural_language_instruction"] = [b"pick coke can"] * 5
        flat["steps/observation/image"] = [encoded(picture(episode, t, 16, 20), "jpeg") for t in range(5)]
        records.append(example(flat))
    return write(root, name, features, records, version="0.1.0", splits={"train": (2,)}), written
