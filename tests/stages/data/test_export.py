"""Any source as Episode-HDF5 and back: the same numbers and images, resumable, nothing overwritten or lost silently."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.robomimic import RobomimicSource
from dvla.errors import UserError
from dvla.stages.data.export import export
from support.hdf5_samples import CAN, LENGTHS, edit, same_unified, write_robomimic


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_export_and_read_back(demos, tmp_path, compression):
    source, out = open_source(demos, CAN), tmp_path / "out"
    seen = []
    report = export(source, out, lambda *step: seen.append(step), compression=compression)
    assert (report.episodes, report.frames, report.quarantined, report.kept) == (3, sum(LENGTHS), 0, 0)
    assert report.bytes == sum(p.stat().st_size for p in out.glob("ep_*"))
    assert seen[-1][1:] == (3, 3)
    assert sorted(p.name for p in out.glob("*")) == [
        ".lock",
        "ep_000000.hdf5",
        "ep_000002.hdf5",
        "ep_000010.hdf5",
        "quarantine.jsonl",
    ]
    same_unified(source, open_source(out))
    with h5py.File(out / "ep_000002.hdf5") as file:  # the layout of the description
        assert {k: (v.shape, v.dtype) for k, v in file.items() if k in ("actions", "proprio", "action_mask")} == {
            "actions": ((5, 128), np.float32),
            "proprio": ((5, 128), np.float32),
            "action_mask": ((128,), np.bool_),
        }
        assert file["language"].asstr()[()] == "" and file["images/view_0"].compression == (
            None if compression == "none" else compression
        )
        assert {
            k: file.attrs[k] for k in ("dataset_name", "embodiment_id", "episode_length", "n_views", "action_dim")
        } == {
            "dataset_name": "PickPlaceCan_image",
            "embodiment_id": 4,
            "episode_length": 5,
            "n_views": 2,
            "action_dim": 7,
        }


def test_export_of_an_export_is_the_same(episode_folder, tmp_path):
    """Also from files without the additions: what was derived is then written down."""
    export(open_source(episode_folder), tmp_path / "one")
    export(open_source(tmp_path / "one"), tmp_path / "two")
    same_unified(open_source(episode_folder), open_source(tmp_path / "two"))
    assert "no proprio_mask" not in open_source(tmp_path / "two").config.note


def test_export_bytes_do_not_depend_on_interruptions(demos, tmp_path, monkeypatch):
    export(open_source(demos, CAN), tmp_path / "whole")
    source, load = open_source(demos, CAN), RobomimicSource.load

    def stop_at_the_second(self, number):
        episode = load(self, number)
        if number == 2:
            first, last = episode.views

            def broken_off(start, stop):
                yield next(last.open(start, stop))
                raise KeyboardInterrupt

            return replace(episode, views=(first, replace(last, open=broken_off)))
        return episode

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RobomimicSource, "load", stop_at_the_second)
        export(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock"] == ["ep_000000.hdf5"]
    (tmp_path / "out" / ".ep_000002.hdf5.tmp-1").write_bytes(b"left by a killed export")
    first = (tmp_path / "out" / "ep_000000.hdf5").stat().st_mtime_ns
    report = export(source, tmp_path / "out")
    assert (report.episodes, report.kept) == (3, 1) and (
        tmp_path / "out" / "ep_000000.hdf5"
    ).stat().st_mtime_ns == first
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    assert export(source, tmp_path / "out").kept == 3


def test_export_quarantines_what_cannot_be_used(tmp_path):
    path = write_robomimic(tmp_path / "image.hdf5", compression="gzip")
    edit(path, lambda f: f["data/demo_2/actions"].__setitem__((1, 1), np.nan))
    with h5py.File(path) as file:
        offset = file["data/demo_10/obs/agentview_image"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 2 : offset + 40] = b"\xff" * 38  # found only by decoding
    path.write_bytes(data)
    report = export(open_source(path, CAN), tmp_path / "out")
    assert (report.episodes, report.quarantined) == (1, 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["episode_id"]) for line in lines] == [
        ("PickPlaceCan_image", 2),
        ("PickPlaceCan_image", 10),
    ]
    assert "'actions' is nan at frame 1" in lines[0]["reason"] and "cannot be decoded" in lines[1]["reason"]
    assert open_source(tmp_path / "out").episode_ids == (0,)
    edit(path, lambda f: f["data/demo_0/actions"].__setitem__((1, 1), np.nan))
    with pytest.raises(
        UserError, match="delete .*ep_000000.hdf5: it was exported before, but its episode cannot be read now"
    ):
        export(open_source(path, CAN), tmp_path / "out")
    with pytest.raises(UserError, match="no usable episode .*is nan"):
        export(open_source(path, CAN), tmp_path / "other")


def test_export_refuses_what_is_not_its_own(demos, episode_folder, tmp_path, monkeypatch):
    source, out = open_source(demos, CAN), tmp_path / "out"
    export(source, out)
    with pytest.raises(UserError, match="exported with another compression; choose another --out"):
        export(source, out, compression="gzip")
    scaled = replace(source.config, state=(), name="mine")
    with pytest.raises(UserError, match="exported with another state_map"):
        export(open_source(demos, scaled), out)
    with pytest.raises(UserError, match="holds episodes that the source does not have .ep_000010.hdf5"):
        export(open_source(episode_folder), out)
    edit(demos, lambda f: f["data/demo_0/actions"].__setitem__((0, 0), 0.5))
    with pytest.raises(UserError, match="ep_000000.hdf5 was exported from other data"):
        export(open_source(demos, CAN), out)
    (out / "ep_000000.hdf5").write_bytes(b"broken")
    with pytest.raises(UserError, match="is damaged or not an export"):
        export(open_source(demos, CAN), out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
        export(source, out)
    with pytest.raises(UserError, match="holds the source itself"):
        export(open_source(episode_folder), episode_folder)
    with pytest.raises(UserError, match="unknown compression 'gzp'; did you mean 'gzip'"):
        export(source, tmp_path / "new", compression="gzp")
    with pytest.raises(UserError, match="unknown export format 'hdf5'; did you mean 'episode_hdf5'"):
        export(source, tmp_path / "new", to="hdf5")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="cannot write .*ep_000000.hdf5: it needs 0 MiB, the disk has 0 MiB left"):
        export(source, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        export(source, tmp_path / "file")


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda pictures: pictures[:-1], "4 images of 'robot0_eye_in_hand' for 5 rows"),
        (lambda pictures: [*pictures, pictures[0]], r"image 5 of 'robot0_eye_in_hand' is \[6, 8, 3\], expected 5 of"),
        (
            lambda pictures: [pictures[0][:4], *pictures[1:]],
            r"image 0 of 'robot0_eye_in_hand' is \[4, 8, 3\], expected 5 of",
        ),
    ],
)
def test_pictures_that_are_not_what_their_view_says(demos, tmp_path, monkeypatch, how, message):
    source, load = open_source(demos, CAN), RobomimicSource.load

    def changed(self, number):
        episode = load(self, number)
        first, last = episode.views
        if number != 2:
            return episode
        return replace(episode, views=(first, replace(last, open=lambda *span: iter(how(list(last.open(*span)))))))

    monkeypatch.setattr(RobomimicSource, "load", changed)
    assert export(source, tmp_path / "out").quarantined == 1
    assert re.search(message, (tmp_path / "out" / "quarantine.jsonl").read_text())
    assert open_source(tmp_path / "out").episode_ids == (0, 10)


def test_a_pipe_in_the_place_of_its_lock_is_not_waited_for(episode_folder, tmp_path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out/.lock")
    with pytest.raises(UserError, match="cannot write to .*: it is a socket or pipe, expected a file"):
        export(open_source(episode_folder), tmp_path / "out")
