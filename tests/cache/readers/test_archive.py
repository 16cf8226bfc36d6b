"""Folders, zips and tars read alike; an archive that would leave its folder, lies or is damaged is one line."""

import io
import stat
import struct
import tarfile
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla.cache.readers import archive
from dvla.cache.readers.archive import open_archive
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import UserError

FILES = {
    "a/b/0.png": b"first" * 100,
    "a/b/10.png": b"",
    "a/c.pkl": bytes(range(256)) * 40,
    "top.pkl": b"x",
    "a/b/no.txt": b"not wanted",
}
WANTED = r"\.(png|pkl)$"


def a_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def a_tar(path, files, **fields):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The same files in a folder, zips and a tar."""
    root = tmp_path_factory.mktemp("archives")
    for name, data in FILES.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    long = {f"./{n}": d for n, d in FILES.items()}  # "./a/b" as `tar -cf x.tar .` writes it
    return {
        "folder": root / "folder",
        "deflated": a_zip(root / "d.zip", FILES),
        "tar": a_tar(root / "t.tar", long),
        "stored": a_zip(root / "S.ZIP", FILES, zipfile.ZIP_STORED),
    }


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        open_archive(path, WANTED).entries()
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def corrupt(path, name, message):
    with pytest.raises(CorruptEpisode, match=message) as caught:
        open_archive(path, WANTED).read(name, "set episode 4")
    assert str(caught.value).startswith(f"set episode 4: {name} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "deflated", "stored", "tar"])
def test_all_kinds_read_alike(packed, kind):
    found = open_archive(packed[kind], WANTED)
    assert found.entries() == ("a/", "top.pkl") and found.entries("a") == ("b/", "c.pkl") == found.entries("a/")
    assert [e for e in found.entries("a/b") if e != "no.txt"] == ["0.png", "10.png"]
    assert found.entries("nowhere") == () == found.entries("top.pkl")
    for name, data in FILES.items():
        if not name.endswith(".txt"):
            assert found.read(name, "x") == data
    corrupt(packed[kind], "a/b/3.png", "a/b/3.png is missing")
    corrupt(packed[kind], "nowhere/3.png", "is missing")


def test_a_zip_behind_other_bytes_and_one_with_folders(tmp_path):
    plain = a_zip(tmp_path / "plain.zip", FILES)
    (tmp_path / "behind.zip").write_bytes(b"#!/bin/sh\n" + plain.read_bytes())
    assert open_archive(tmp_path / "behind.zip", WANTED).read("a/c.pkl", "x") == FILES["a/c.pkl"]
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as file:
        file.mkdir("episodes/episode3")
    assert open_archive(tmp_path / "empty.zip", WANTED).entries("episodes") == ("episode3/",)


def test_the_index_is_kept_and_renewed(packed, tmp_path, monkeypatch):
    path = a_zip(tmp_path / "x.zip", FILES)
    opened = []
    original = zipfile.ZipFile
    monkeypatch.setattr(archive.zipfile, "ZipFile", lambda *a: opened.append(a) or original(*a))
    for _ in range(3):
        assert open_archive(path, WANTED).read("top.pkl", "x") == b"x"
    assert len(opened) == 1
    monkeypatch.undo()
    a_zip(path, {"top.pkl": b"changed", "new.pkl": b""})
    assert open_archive(path, WANTED).read("top.pkl", "x") == b"changed"
    path.unlink()
    refused(path, "cannot be read: No such file|is not a folder")


# --- members that leave the archive --------------------------------------------------------------------------------


OUTSIDE = [
    "../x.png",
    "a/../../x.png",
    "/etc/x.png",
    "C:/x.png",
    "c:x.png",
    "..\\x.png",
    "\\\\server\\x.png",
    "a\\..\\..\\x.txt",
    "a/b/..",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_members_outside_their_folder(tmp_path, name):
    """Whatever they are called and whether or not they are wanted: the archive is refused, nothing is written."""
    files = {"good.png": b"1", name: b"2"}
    for path in (a_zip(tmp_path / "x.zip", files), a_tar(tmp_path / "x.tar", files)):
        refused(path, "member .* is outside its folder; the archive is refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.zip"]


def test_links_and_devices(tmp_path):
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        info = zipfile.ZipInfo("link.txt")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            file.writestr(info, "/etc/passwd")
        refused(tmp_path / "x.zip", "member 'link.txt' is a link or a device; the archive is refused")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        refused(
            a_tar(tmp_path / "x.tar", {"link.txt": b""}, type=kind, linkname="/etc/passwd"),
            "member 'link.txt' is a link, a device or sparse; the archive is refused",
        )


def test_names_that_are_no_names(tmp_path):
    refused(
        a_zip(tmp_path / "deep.zip", {"a/" * 5000 + "x.png": b""}),
        "lies more than 64 folders deep; the archive is refused",
    )
    refused(
        a_zip(tmp_path / "line.zip", {"a\nb\x1b[2J.png": b""}),
        r"member 'a\?b\?\[2J.png' has characters in its name that",
    )
    refused(a_tar(tmp_path / "line.tar", {"a\rb/x.png": b""}), r"member 'a\?b/x.png' has characters in its name that")
    refused(a_zip(tmp_path / "empty.zip", {"./.": b"1"}), "member './.' has no name; the archive is refused")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.writestr("x.png", b"1")
        file.writestr("x.png", b"2")
    refused(tmp_path / "twice.zip", "member 'x.png' appears twice; the archive is refused")


# --- what is packed in another way, lies or is damaged -------------------------------------------------------------


def patched(path, at, form, value, marker=b"PK\x01\x02"):
    """A zip whose index has another value at `at` of its first entry."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(marker) + at, value)
    path.write_bytes(data)
    return path


def test_other_packings(tmp_path):
    secret = patched(a_zip(tmp_path / "secret.zip", {"x.png": b"1"}), 8, "<H", 1)
    refused(secret, "member 'x.png' is encrypted; the archive is refused")
    for method, number in ((zipfile.ZIP_BZIP2, 12), (zipfile.ZIP_LZMA, 14)):
        refused(
            a_zip(tmp_path / "other.zip", {"x.png": b"1"}, method), f"member 'x.png' is packed by method {number}, not"
        )
    assert (
        open_archive(a_zip(tmp_path / "other.zip", {"x.txt": b"1"}, zipfile.ZIP_LZMA), WANTED).entries() == ()
    )  # not wanted
    for name, mode in {
        "x.tar.gz": "w:gz",
        "x.tgz": "w:gz",
        "x.tar.xz": "w:xz",
        "bz2.tar": "w:bz2",
        "gz.tar": "w:gz",
    }.items():
        with tarfile.open(tmp_path / name, mode) as file:
            file.addfile(tarfile.TarInfo("x.png"))
        refused(
            tmp_path / name, "is compressed as one stream, so single images cannot be read from it; extract it first"
        )
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    refused(tmp_path / "x.rar", "compressed as one stream")
    for name in ("x.zip", "x.tar"):
        (tmp_path / name).write_bytes(b"this is no archive" * 100)
        refused(tmp_path / name, "is cut off or damaged .*; fetch it again")


def test_bombs(tmp_path, monkeypatch):
    lie = patched(a_zip(tmp_path / "lie.zip", {"x.png": b"1"}), 24, "<L", 0xFFFFFFF0)
    corrupt(lie, "x.png", "its 3 bytes claim to unpack to 4,294,967,280")
    bomb = a_zip(tmp_path / "bomb.zip", {"x.png": bytes(50_000_000)})  # a thousand to one, as deflate can
    assert bomb.stat().st_size < 60_000
    monkeypatch.setattr(archive, "MAX_MEMBER", 1 << 20)
    corrupt(bomb, "x.png", "claim to unpack to 50,000,000")
    held = []
    original = zlib.decompressobj

    class Watch:
        def __init__(self, *a):
            self.inner = original(*a)

        def decompress(self, data, most):
            out = self.inner.decompress(data, most)
            held.append(len(out))
            return out

    monkeypatch.setattr(archive.zlib, "decompressobj", Watch)
    corrupt(
        patched(bomb, 24, "<L", 5000), "x.png", "is damaged .its checksum does not match"
    )  # a small size that is a lie
    assert held == [5001]
    for kind in ("big.tar", "big.png"):
        data = {"big.png": bytes((1 << 20) + 1)}
        path = a_tar(tmp_path / kind, data) if kind.endswith("tar") else tmp_path
        path.is_dir() and (path / "big.png").write_bytes(data["big.png"])
        corrupt(path, "big.png", "1,048,577|larger than 1 MiB")


def test_damaged_members(tmp_path):
    path = a_zip(tmp_path / "x.zip", {"x.png": bytes(range(250))}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data.replace(bytes(range(250)), bytes(range(249)) + b"\xff"))
    corrupt(path, "x.png", "is damaged .its checksum does not match")
    moved = patched(a_zip(tmp_path / "y.zip", {"x.png": b"1" * 99}), 0, "<L", 0, b"PK\x03\x04")
    corrupt(moved, "x.png", "is damaged .its header is not where the index says")
    deflated = a_zip(tmp_path / "z.zip", {"x.png": bytes(range(250)) * 20})
    corrupt(patched(deflated, 35, "<L", 0xFFFFFFFF, b"PK\x03\x04"), "x.png", "is damaged")


@pytest.mark.parametrize("kind", ["deflated", "tar"])
def test_an_archive_cut_anywhere(packed, tmp_path, kind):
    """Never an episode fewer in silence: an archive that lost its end is named."""
    data = packed[kind].read_bytes()
    path, end = tmp_path / packed[kind].name, len(data.rstrip(b"\0")) if kind == "tar" else len(data)
    for at in [*range(0, end, 97), *range(512, end, 512), end - 1]:
        path.write_bytes(data[:at])
        refused(path, "is cut off or damaged .*; fetch it again")


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_damage_anywhere_is_one_of_our_errors(packed, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["deflated", "stored", "tar"]))
    good = packed[kind].read_bytes()
    at, count = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 6))
    path = tmp_path_factory.mktemp("damaged") / packed[kind].name
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=8)) + good[at + count :])
    found = open_archive(path, WANTED)
    for name in FILES:
        try:
            found.entries(name.rpartition("/")[0])
            found.read(name, "x")
        except (UserError, CorruptEpisode) as error:
            assert "\n" not in str(error)
