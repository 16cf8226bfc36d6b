"""Seeded damage to a folder of files: bits, lengths and names of any file, and what those say that are understood.

Each mutation is a function of the folder and a random generator; it says in words what it did.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.rlds_samples import masked_crc

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DEEP = 3000  # levels of a nested JSON value


@dataclass(frozen=True)
class Mutation:
    """What was done to which file."""

    file: str  # relative to the folder
    what: str
    sound: bool = False  # the file is a sound one of its kind afterwards: it says something else


def mutate(root: Path, rng: random.Random, only: str = "*") -> Mutation:
    """Damage one file below `root` whose name fits the pattern `only`."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and fnmatch.fnmatch(p.name, only))
    kinds: dict[str, list[Path]] = {}  # each kind of file is as likely as any other, however many there are
    for path in files:
        kinds.setdefault(f"{path.parent.name if path.suffix == '.parquet' else ''}{_kind(path)}", []).append(path)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    name = path.relative_to(root).as_posix()
    structured = STRUCTURED.get(_kind(path))
    if structured and rng.random() < 0.6:
        before = path.read_bytes()
        try:
            what = structured(path, rng)
        except Exception as error:  # the library refuses to write such a file
            path.write_bytes(before)
            what = f"nothing, {type(error).__name__}"
        return Mutation(name, what, True)
    how = rng.choice(ANY)
    return Mutation(name, how(path, rng, files), how in (exchange, replace, duplicate))


def _kind(path: Path) -> str:
    return ".tfrecord" if ".tfrecord" in path.name else ".json" if path.name[:2] == ".z" else path.suffix


# --- any file ---------------------------------------------------------------------------------------------------------


def flip_bits(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 2, 8)))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped in bytes {places}"


def overwrite(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    start, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 8, 64, 4096))
    fill = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", None))
    data[start : start + length] = fill * length if fill else rng.randbytes(length)
    path.write_bytes(data)
    return f"bytes {start} to {start + length - 1} overwritten with {fill or 'noise'}"


def truncate(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = path.read_bytes()
    length = rng.choice((0, 1, rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 64))))
    path.write_bytes(data[:length])
    return f"cut off after {length} of {len(data)} bytes"


def insert(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = path.read_bytes()
    at, more = rng.choice((0, len(data), rng.randrange(len(data) + 1))), rng.randbytes(rng.choice((1, 4, 64, 5000)))
    path.write_bytes(data[:at] + more + data[at:])
    return f"{len(more)} bytes inserted at {at}"


def drop_bytes(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = path.read_bytes()
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 64, 512))
    path.write_bytes(data[:at] + data[at + length :])
    return f"bytes {at} to {at + length - 1} removed"


def remove(path: Path, rng: random.Random, files: list[Path]) -> str:
    path.unlink()
    return "removed"


def exchange(path: Path, rng: random.Random, files: list[Path]) -> str:
    """With another file, of its own kind where there is one."""
    others = [f for f in files if f != path and (f.suffix == path.suffix or rng.random() < 0.1)]
    if not others:
        return remove(path, rng, files)
    other = rng.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    if rng.random() < 0.5:
        other.write_bytes(one)
        return f"exchanged with {other.name}"
    return f"replaced by {other.name}"


def replace(path: Path, rng: random.Random, files: list[Path]) -> str:
    what = rng.choice(("a Git LFS pointer", "text", "nothing", "a folder"))
    path.unlink()
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"a Git LFS pointer": LFS, "text": b"<html>404: Not Found</html>\n", "nothing": b""}[what])
    return f"replaced by {what}"


def duplicate(path: Path, rng: random.Random, files: list[Path]) -> str:
    copy = path.with_name(rng.choice((f"copy_{path.name}", f"._{path.name}", f"{path.stem}1{path.suffix}")))
    shutil.copy(path, copy)
    return f"copied to {copy.name}"


def put_in_place(path: Path, rng: random.Random, files: list[Path]) -> str:
    """Something that is no file in the place of a file, or of its folder."""
    if rng.random() < 0.2 and not all(f.is_relative_to(path.parent) for f in files):
        path = path.parent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    what = rng.choice(tuple(SPECIAL))
    SPECIAL[what](path)
    return f"{path.name} replaced by {what}"


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to its folder": lambda path: path.symlink_to("."),
}
Change = Callable[[Path, random.Random, list[Path]], str]
ANY: tuple[Change, ...] = (
    flip_bits,
    flip_bits,
    flip_bits,
    overwrite,
    overwrite,
    truncate,
    insert,
    drop_bytes,
    remove,
    exchange,
    replace,
    duplicate,
    put_in_place,
)

# --- JSON -------------------------------------------------------------------------------------------------------------


def odd_value(rng: random.Random, old: Any) -> str:
    """JSON text of something else."""
    numbers = ["-1", "0", "1", "2", "1e308", "1e400", "NaN", "-Infinity", "0.5", "1" + "0" * 30, "2147483648"]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        numbers += [str(old + 1), str(old - 1), str(old * 1000), f'"{old}"', str(float(old))]
    texts = ['""', '"\\u0000"', '"\\u2028\\u001b[2J"', '"\\ud800"', '"../../x"', '"/etc/passwd"', '"{0.__class__}"']
    texts += ['"{episode_index:0999999999d}"', '"{}"', '"[red]x[/red]"', json.dumps("x" * 70000), '"é"']
    other = ["null", "true", "[]", "{}", "[null]", "[[]]", '{"a": 1}', "[" * DEEP + "]" * DEEP, '{"":null}']
    other += ["[1, 2, 3, 4]", "[1000000000, 1000000000]", f"[{json.dumps(old)}]"]
    return rng.choice(rng.choice((numbers, texts, other)))


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """(mapping or list, key in it) of every value inside a document, outer ones first."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places_of(value[key])]
    return found


def change_json(text: str, rng: random.Random) -> tuple[str, str]:
    """(the document with one change, what it was)."""
    document = json.loads(text)
    places = places_of(document)
    if not places:
        return odd_value(rng, document), "replaced as a whole"
    parent, key = rng.choice(places)
    old, how = parent[key], rng.choice(("replace", "replace", "replace", "remove", "twice"))
    if how == "remove":
        del parent[key]
        return json.dumps(document), f"{key!r} removed"
    value = odd_value(rng, old)
    parent[key] = "<<<here>>>"
    named = value if len(value) < 60 else f"{value[:40]}… ({len(value)} characters)"
    if how == "twice" and isinstance(parent, dict):
        new = json.dumps(document).replace('"<<<here>>>"', f"{json.dumps(old)}, {json.dumps(key)}: {value}")
        return new, f"{key!r} given twice, then as {named}"
    return json.dumps(document).replace('"<<<here>>>"', value), f"{key!r}: {json.dumps(old)[:40]} is {named}"


def json_file(path: Path, rng: random.Random) -> str:
    text, what = change_json(path.read_text(), rng)
    path.write_text(text)
    return what


def json_lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().split("\n")[:-1]
    at = rng.randrange(len(lines))
    how = rng.choice(
        ("change", "change", "change", "change", "torn", "twice", "remove", "blank", "bom", "order", "glued")
    )
    what = f"line {at}: {how}"
    if how == "change":
        lines[at], changed = change_json(lines[at], rng)
        what = f"line {at}: {changed}"
    elif how == "torn":
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
    elif how == "twice":
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif how == "remove":
        del lines[at]
    elif how == "blank":
        lines.insert(at, rng.choice(("", "  ", "\r", "null", "\u2028")))
    elif how == "bom":
        lines[at] = "\ufeff" + lines[at]
    elif how == "order":
        rng.shuffle(lines)
    else:
        lines[at : at + 2] = ["".join(lines[at : at + 2])]
    path.write_text("\n".join(lines) + "\n")
    return what


# --- YAML ---

YAML = (
    "*a", "&a [*a, *a]", "!!python/object/apply:os.system ['true']", "!!binary AAAA", "!!set {a}", "!!timestamp x",
    "2020-01-01", "2020-01-01T25:61:61Z", ".nan", "-.inf", "0o17", "0x_", "1_000", "1e999", "~", "yes", "? [a]", "|",
    "{<<: 1}", "\t- a", '"\\ud800"', "'", "\x00", "[" * DEEP, "a: b: c", "@", "%YAML 9.9",
)  # fmt: skip


def yaml_file(path: Path, rng: random.Random) -> str:
    """One value of a dataset config replaced, as JSON can say it (which is YAML), or as only YAML can."""
    import yaml

    text = path.read_text()
    how = rng.choice(("value", "value", "value", "raw", "raw", "laughs", "twice", "list"))
    if how == "value":
        changed, what = change_json(json.dumps(yaml.safe_load(text)), rng)
        path.write_text(changed)
        return what
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    if how == "raw":
        lines[at] = lines[at].partition(":")[0] + f": {rng.choice(YAML)}"
    elif how == "laughs":
        lines += ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
        lines[at] = lines[at].partition(":")[0] + ": *a9"
    elif how == "twice":
        lines.insert(at, lines[at])
    else:
        lines = ["- a"]
    path.write_text("\n".join(lines))
    return f"line {at}: {how}: {lines[min(at, len(lines) - 1)][:60]!r}"


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, rng: random.Random) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    at, field, rows = table.column_names.index(name), table.schema.field(name), table.num_rows
    values = table[name].to_pylist()
    row = rng.randrange(rows) if rows else 0
    how = rng.choice(PARQUET)
    if how == "drop":
        table = table.remove_column(at)
    elif how == "null":
        values[row] = None
        table = table.set_column(at, name, pa.array(values, field.type))
    elif how == "nulls":
        table = table.set_column(at, name, pa.nulls(rows, rng.choice((field.type, pa.null()))))
    elif how == "type":
        kind = rng.choice(("string", "float", "int8", "bool", "list", "binary", "struct", "dictionary", "time"))
        table = table.set_column(at, name, _retyped(values, kind))
        how = f"as {kind}"
    elif how == "value":
        odd = rng.choice((-1, 0, 2**31, 2**62, 1e30, float("nan"), float("inf")))
        values[row] = _with(values[row], odd)
        integral = not isinstance(odd, float)
        kept = pa.types.is_floating(field.type) or pa.types.is_list(field.type) or integral
        table = table.set_column(at, name, pa.array(values, field.type if kept else None))
        how = f"{odd} in row {row}"
    elif how == "rename":
        table = table.rename_columns([f"{n}_" if n == name else n for n in table.column_names])
    elif how == "twice":
        table = table.append_column(name, table[name])
    elif how == "rows":
        order = [rng.randrange(rows) for _ in range(rng.choice((0, 1, rows, rows + 3)))]
        table, how = table.take(order), "other rows"
    elif how == "reverse":
        table = table.take(list(range(rows))[::-1])
    else:
        table = table.slice(0, max(0, rows - 1))
    pq.write_table(table, path, row_group_size=max(1, rng.choice((rows, 3))))
    return f"column {name}: {how}"


PARQUET = (
    "drop",
    "null",
    "null",
    "nulls",
    "type",
    "type",
    "value",
    "value",
    "rename",
    "twice",
    "rows",
    "reverse",
    "cut",
)


def _with(value: Any, odd: float) -> Any:
    if isinstance(value, list) and value:
        return [_with(value[0], odd), *value[1:]]
    return value if isinstance(value, (dict, str, bytes)) else odd


def _retyped(values: list[Any], kind: str) -> Any:
    import pyarrow as pa

    rows = len(values)
    return {
        "string": lambda: pa.array([str(v) for v in values]),
        "float": lambda: pa.array([float(np.ravel(v)[0]) for v in values]),
        "int8": lambda: pa.array([int(np.ravel(v)[0]) % 100 for v in values], pa.int8()),
        "bool": lambda: pa.array([True] * rows),
        "list": lambda: pa.array([[v] for v in values]),
        "binary": lambda: pa.array([str(v).encode() for v in values]),
        "struct": lambda: pa.array([{"a": v} for v in values]),
        "dictionary": lambda: pa.array([str(v) for v in values]).dictionary_encode(),
        "time": lambda: pa.array(range(rows), pa.timestamp("ns")),
    }[kind]()


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def hdf5(path: Path, rng: random.Random) -> str:
    import h5py

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        attributes = [(n, a) for n in ["/", *names] for a in file[n].attrs]
        if attributes and rng.random() < 0.3:
            return _attribute(file, *rng.choice(attributes), rng)
        name = rng.choice(names)
        old = file[name]
        value = old[()] if isinstance(old, h5py.Dataset) else np.zeros(3)
        del file[name]
        what, make = rng.choice(_members(file, name, np.asarray(value), rng))
        make()
        return f"{name}: {what}"


def _members(file: Any, name: str, value: np.ndarray, rng: random.Random) -> list[tuple[str, Callable[[], object]]]:
    import h5py

    text, shape = h5py.string_dtype(), value.shape
    huge = (10**9, *shape[1:])
    return [
        ("removed", lambda: None),
        ("a group", lambda: file.create_group(name)),
        ("a scalar", lambda: file.create_dataset(name, data=3.5)),
        ("empty", lambda: file.create_dataset(name, data=h5py.Empty("f4"))),
        ("no rows", lambda: file.create_dataset(name, (0, *shape[1:]), value.dtype)),
        ("one row", lambda: file.create_dataset(name, data=value[:1] if value.ndim else value)),
        ("text", lambda: file.create_dataset(name, data=["a", "b"], dtype=text)),
        ("bytes", lambda: file.create_dataset(name, data=rng.randbytes(50))),
        ("a link to itself", lambda: file.__setitem__(name, h5py.SoftLink(f"/{name}"))),
        ("a link to nothing", lambda: file.__setitem__(name, h5py.SoftLink("/nowhere"))),
        ("a link outside", lambda: file.__setitem__(name, h5py.ExternalLink("/etc/passwd", "/"))),
        ("huge, never written", lambda: file.create_dataset(name, huge, value.dtype, chunks=(1, *shape[1:]))),
        ("huge, contiguous", lambda: file.create_dataset(name, huge, "f8")),
        ("huge, compressed", lambda: file.create_dataset(name, (10**9,), "u1", chunks=(10**6,), compression="gzip")),
        ("as float16", lambda: file.create_dataset(name, data=value.astype("f2"))),
        ("as float64", lambda: file.create_dataset(name, data=value.astype("f8"))),
        ("as complex", lambda: file.create_dataset(name, data=value.astype("c8"))),
        ("as records", lambda: file.create_dataset(name, shape, np.dtype([("a", "f4"), ("b", "u1")]))),
        ("of unequal rows", lambda: file.create_dataset(name, (5,), h5py.vlen_dtype(np.uint8))),
        ("references", lambda: file.create_dataset(name, (5,), h5py.ref_dtype)),
        ("not finite", lambda: file.create_dataset(name, data=np.full(shape, np.nan))),
        ("one axis more", lambda: file.create_dataset(name, data=value[None])),
        ("turned", lambda: file.create_dataset(name, data=value.T)),
        ("flat", lambda: file.create_dataset(name, data=value.ravel())),
    ]


def _attribute(file: Any, name: str, key: str, rng: random.Random) -> str:
    import h5py

    old = file[name].attrs[key]
    values: list[Any] = [
        None,
        "",
        "x",
        "{",
        "[]",
        "null",
        '{"a": ' * DEEP,
        -1,
        0,
        2**40,
        1e300,
        float("nan"),
        b"\xff\xfe",
    ]
    values += [np.zeros(3), np.zeros((2, 2)), h5py.Empty("f4"), [1, 2], ["a", "b"], True, np.complex64(1)]
    if isinstance(old, str) and old[:1] == "{":
        text, what = change_json(old, rng)
        file[name].attrs[key] = text
        return f"attribute {key} of {name}: {what}"
    value = rng.choice(values)
    del file[name].attrs[key]
    if value is not None:
        file[name].attrs[key] = value
    return f"attribute {key} of {name}: {str(old)[:20]} is {str(value)[:40]}"


# --- TFRecord ---------------------------------------------------------------------------------------------------------


def tfrecord(path: Path, rng: random.Random) -> str:
    """With right checksums."""
    data, records, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        records.append(bytearray(data[at + 12 : at + 12 + length]))
        at += length + 16
    number = rng.randrange(len(records))
    how, lengths = rng.choice(("flip", "flip", "noise", "length", "twice", "remove", "cut", "empty")), {}
    record = records[number]
    if how == "flip":
        for _ in range(rng.choice((1, 3))):
            record[rng.choice((rng.randrange(len(record)), rng.randrange(min(200, len(record)))))] ^= (
                1 << rng.randrange(8)
            )
    elif how == "noise":
        start = rng.randrange(len(record))
        record[start : start + 8] = rng.randbytes(8)
    elif how == "length":
        lengths[number] = rng.choice((0, 1, len(record) + 1, 2**31, 2**40, 2**63, 2**64 - 1))
    elif how == "twice":
        records.insert(number, record)
    elif how == "remove":
        del records[number]
    elif how == "cut":
        del record[rng.randrange(len(record)) :]
    else:
        record.clear()
    out = bytearray()
    for i, each in enumerate(records):
        head = struct.pack("<Q", lengths.get(i, len(each)))
        out += head + struct.pack("<I", masked_crc(head)) + each + struct.pack("<I", masked_crc(bytes(each)))
    path.write_bytes(out)
    return f"record {number}: {how} {lengths or ''}"


# --- images, arrays, video, pickles -----------------------------------------------------------------------------------


def image(path: Path, rng: random.Random) -> str:
    """Another sound image, or a header that promises too much."""
    from PIL import Image

    found = Image.open(path)
    found.load()
    size = found.size
    if path.suffix == ".png" and rng.random() < 0.3:
        data = bytearray(path.read_bytes())
        wide, high = rng.choice(((2**31 - 1, 1), (20000, 20000), (0, 5), (size[0], 2**20), (1, 60000)))
        data[16:24] = struct.pack(">II", wide, high)
        import zlib

        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
        return f"a header of {wide} x {high}"
    mode = rng.choice(("1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F"))
    other = rng.choice((size, (size[0] + 1, size[1]), (1, 4000), (3000, 3000), (1, 1)))
    made = Image.new("I;16", other, 40000) if mode == "I;16" else found.resize(other).convert("RGB").convert("L")
    made = made if mode in ("I;16", "L") else made.convert(mode if mode in ("1", "I", "F") else "RGB").convert(mode)
    buffer = io.BytesIO()
    kind = rng.choice(("PNG", "TIFF", "BMP", "JPEG", "GIF", "WEBP"))
    made.save(buffer, kind)
    path.write_bytes(buffer.getvalue())
    return f"a {kind} of {other} in mode {mode}"


def arrays(path: Path, rng: random.Random) -> str:
    """One array of an .npz or .npy of another shape or type."""
    loaded = np.load(path)
    found = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    name = rng.choice(sorted(found))
    old = found[name]
    what, new = rng.choice(
        (
            ("no rows", old[:0]),
            ("a scalar", np.float64(3)),
            ("not finite", np.full(old.shape, np.nan)),
            ("huge values", np.full(old.shape, 1e300)),
            ("text", np.array(["a", "b"])),
            ("objects", np.array([None, {}], object)),
            ("one axis more", old[None]),
            ("flat", old.ravel()),
            ("complex", old.astype(np.complex64)),
            ("integers", np.zeros(old.shape, np.int64)),
            ("other rows", np.concatenate([old, old])),
            ("removed", None),
        )
    )
    found[name] = new
    found = {k: v for k, v in found.items() if v is not None}
    if path.suffix == ".npz":
        np.savez(path, **found)
        return f"{name}: {what}"
    buffer = io.BytesIO()
    np.save(buffer, found.get("", np.zeros(0)), allow_pickle=True)
    data = buffer.getvalue()
    if rng.random() < 0.3:
        data = data.replace(str(old.shape).encode(), b"(1000000000000,)", 1)
        what = "a header of 10^12"
    path.write_bytes(data)
    return what


def video(path: Path, rng: random.Random) -> str:
    """A number in the tables of an mp4 replaced."""
    data = bytearray(path.read_bytes())
    boxes = [b"mvhd", b"tkhd", b"mdhd", b"hdlr", b"stsd", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"elst"]
    box = rng.choice([b for b in boxes if b in data] or [data[4:8]])
    start = data.index(bytes(box)) + 4
    at, value = start + 4 * rng.randrange(20), rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, rng.getrandbits(32)))
    data[at : at + 4] = struct.pack(">I", value)
    path.write_bytes(data)
    return f"{value} at {at - start} of {bytes(box).decode(errors='replace')}"


def pickled(path: Path, rng: random.Random) -> str:
    """Another pickle, or one with a long count."""
    import pickle

    choices = [None, [], {}, [None], [[[]]], "text", 10**400, [{"a": 1}] * 3, float("nan"), np.zeros(3), {1: {2: 3}}]
    loops: list[Any] = []
    loops.append(loops)
    value = rng.choice([*choices, loops])
    data = pickle.dumps(value, rng.choice((0, 2, 4, 5)))
    if rng.random() < 0.3:
        data = path.read_bytes()
        at = rng.randrange(2, len(data))
        data = data[:at] + rng.choice((b"\x8d", b"\x8e", b"\x96", b"T", b"\x8b")) + struct.pack("<Q", 2**40) + data[at:]
        path.write_bytes(data)
        return f"a long count at {at}"
    path.write_bytes(data)
    return f"a pickle of {str(value)[:30]}"


def words(path: Path, rng: random.Random) -> str:
    """Text with one word replaced."""
    parts = path.read_text(errors="replace").replace(">", "> ").split(" ")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice(
        ("", "-1", "999999999999999999999", "\u2028", "&lol;", "<!DOCTYPE a [<!ENTITY lol 'x'>]>", "nan")
    )
    path.write_text(" ".join(parts))
    return f"word {at} is {parts[at]!r}"


STRUCTURED: dict[str, Callable[[Path, random.Random], str]] = {
    ".json": json_file,
    ".jsonl": json_lines,
    ".parquet": parquet,
    ".hdf5": hdf5,
    ".tfrecord": tfrecord,
    ".png": image,
    ".jpg": image,
    ".npz": arrays,
    ".npy": arrays,
    ".mp4": video,
    ".pkl": pickled,
    ".xml": words,
    ".yaml": yaml_file,
}
