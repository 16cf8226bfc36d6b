"""`dvla data video`: the right frames with their curves, legible layouts, and nothing left of a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla import cli
from dvla.cache.readers import open_source
from dvla.cache.readers.episode import Episode, View
from dvla.common.mp4 import mp4_writer
from dvla.errors import UserError
from dvla.stages.data import episode_video as video_grid
from dvla.stages.data.episode_video import (
    WIDTH,
    Scene,
    fit,
    font,
    group_names,
    place_panels,
    place_views,
    wrap,
    write_episode,
)
from support.doctor_samples import MemorySource, config, records
from support.lerobot_samples import LENGTHS, the_file

G1 = [
    f"{side}{part}_joint_{i}_pos"
    for side, part, n in (("left_", "arm", 7), ("", "arm", 7), ("left_", "dex_finger", 6), ("", "dex_finger", 6))
    for i in range(n)
]
BRIDGE = [
    "eef_vel_x",
    "eef_vel_y",
    "eef_vel_z",
    "eef_angular_vel_roll",
    "eef_angular_vel_pitch",
    "eef_angular_vel_yaw",
    "gripper_open",
]
SIZES = {
    "one small": [(128, 128)],
    "three": [(480, 640)] * 3,
    "mixed": [(180, 320), (480, 640), (84, 84), (1280, 720)],
    "six": [(96, 128)] * 6,
}


def episode(sizes: list[tuple[int, int]], dims: int, frames: int = 50, text: str = "push") -> Episode:
    values = np.cumsum(np.random.default_rng(0).normal(size=(frames, dims)), axis=0).astype(np.float32)
    views = tuple(View(f"camera_{i}", h, w, frames, lambda a, b: iter(())) for i, (h, w) in enumerate(sizes))
    return Episode("data", 3, "", text, 10.0, frames, views, values, values, np.arange(frames) / 10)


def apart(boxes: list[tuple[int, int, int, int]], height: int) -> bool:
    """All inside the canvas, none over another."""
    inside = all(0 <= a < c <= WIDTH and 0 <= b < d <= height for a, b, c, d in boxes)
    return inside and not any(
        p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3] for i, p in enumerate(boxes) for q in boxes[:i]
    )


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        return [f.to_ndarray(format="rgb24") for f in container.decode(stream)]


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [G1, BRIDGE, ["dropped"]], ids=["26", "7", "1"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_nothing_overlaps(sizes: list[tuple[int, int]], names: list[str]) -> None:
    made = episode(sizes, len(names), text="a long instruction " * 30)
    scene = Scene(made, names)
    views, bottom, _ = place_views(made.views, 90)
    assert apart(views, bottom) and len(views) == len(sizes)
    for (left, top, right, low), (h, w) in zip(views, sizes):
        assert abs((right - left) / (low - top) / (w / h) - 1) < 0.02  # undistorted
    picture = scene.frame(7, [np.full((h, w, 3), 200, np.uint8) for h, w in sizes])
    assert (
        picture.shape == (scene.height, scene.width, 3)
        and scene.height % 2 == scene.width % 2 == 0
        and scene.height < 1500
    )
    assert apart([*scene._views, *(p._plot for p in scene._panels)], scene.height)
    for panel in scene._panels:  # names and values fit beside their curves
        assert panel._lines[-1] + 15 <= panel._plot[3] + 15 and panel._plot[2] + video_grid.LEGEND <= WIDTH
        assert all(b - a >= 13 for a, b in zip(panel._lines, panel._lines[1:]))


def test_groups() -> None:
    assert [(t, [r[0] for r in rows]) for t, rows in group_names(G1)] == [
        ("left_arm_joint_#_pos   action 0-6", [*range(7)]),
        ("arm_joint_#_pos   action 7-13", [*range(7, 14)]),
        ("left_dex_finger_joint_#_pos   action 14-19", [*range(14, 20)]),
        ("dex_finger_joint_#_pos   action 20-25", [*range(20, 26)]),
    ]
    assert [(t.split()[0], [r[1] for r in rows]) for t, rows in group_names(BRIDGE)] == [
        ("eef_vel_#", ["x", "y", "z"]),
        ("eef_angular_vel_#", ["roll", "pitch", "yaw"]),
        ("gripper_open", ["6"]),
    ]
    many = group_names([f"dex_finger_joint_{i}_pos" for i in range(16)] + ["eef_angle.rot6d[0]", "eef_angle.rot6d[1]"])
    assert [len(rows) for _, rows in many] == [8, 8, 2] and many[2][1] == [(16, "0"), (17, "1")]
    assert sum(len(rows) for _, rows in many) == 18


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(0, 700), st.integers(1, 2))
def test_panels(count: int, left: int, columns: int) -> None:
    boxes = place_panels(count, (left, 40), columns)
    assert len(boxes) == count and apart(boxes, 40 + 12 * 200)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(40, 800), st.integers(1, 3))
def test_text_fits(text: str, width: int, most: int) -> None:
    lines = wrap(text, font(16), width, most)
    assert 1 <= len(lines) <= most and all(font(16).getlength(line) <= width or line == "…" for line in lines)
    if font(16).getlength(" ".join(text.split())) <= width:
        assert lines == [" ".join(text.split())]
    assert fit("short", font(12), 400) == "short"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_video_of_a_recording(recorded: dict[str, Path], tmp_path: Path) -> None:
    out, shown = tmp_path / "new" / "a.mp4", []
    report = write_episode(str(recorded["hevc"]), 1, out, progress=lambda *a: shown.append(a))
    frames, source = decoded(out), open_source(str(recorded["hevc"]))
    assert (
        len(frames) == report.frames == LENGTHS[1]
        and report.fps == 20
        and frames[0].shape == (report.height, report.width, 3)
    )
    assert shown[-1] == ("hevc episode 1: frames", LENGTHS[1], LENGTHS[1]) and list(out.parent.iterdir()) == [out]
    original = source.load(1)
    scene = Scene(original, source.action_map.field_names)
    for view, (left, top, right, bottom) in zip(original.views, scene._views):
        for index, picture in enumerate(view.frames()):  # every frame shows its own picture
            inside = frames[index][top + 4 : bottom - 4, left + 4 : right - 4].astype(float).mean((0, 1))
            assert np.abs(inside - picture.astype(float).mean((0, 1))).max() < 6
    panel = scene._panels[0]
    for index in (0, 6, 12):  # the cursor stands at the frame's time
        line = frames[index][panel._plot[1] : panel._plot[3], panel._plot[0] : panel._plot[2]].min(2).mean(0)
        assert abs(int(line.argmax()) + panel._plot[0] - panel._x[index]) <= 1


def test_same_episode_same_bytes_and_other_speed(recorded: dict[str, Path], tmp_path: Path) -> None:
    source = str(recorded["image"])
    for name, fps in (("a", None), ("b", None), ("c", 7.5)):
        write_episode(source, 0, tmp_path / f"{name}.mp4", fps)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.streams.video[0].average_rate == 7.5 and container.streams.video[0].frames == LENGTHS[0]


def test_single_row_and_constant_action(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = records()
    r = made[0]
    r.action, r.state, r.times, r.listed = r.action[:1], r.state[:1], r.times[:1], 1
    r.pictures = {n: p[:1] for n, p in r.pictures.items()}
    monkeypatch.setattr(video_grid, "open_source", lambda *_, **__: MemorySource(made, config()))
    assert write_episode("x", 0, tmp_path / "a.mp4").frames == 1 and len(decoded(tmp_path / "a.mp4")) == 1


def test_refusals_leave_nothing(
    recorded: dict[str, Path], copy_of: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(recorded["h264"]), tmp_path / "out"
    out.mkdir()
    (out / "mine.mp4").write_bytes(b"mine")
    for arguments, message in (
        ((source, 0, out / "mine.mp4"), "mine.mp4 exists"),
        ((source, 0, out / "a.avi"), "ends in .mp4"),
        ((source, 9, out / "a.mp4"), "no episode 9; it lists 3, 0 to 2"),
        ((source, 0, out / "a.mp4", 0.0), "--fps 0"),
        ((str(tmp_path / "none"), 0, out / "a.mp4"), "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            write_episode(*arguments)
    damaged = copy_of("h264")  # type: ignore[operator]
    video = the_file(damaged, "videos/*front/*/*.mp4")
    video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(UserError, match="h264 episode 0: file-000.mp4 .*dvla data check"):
        write_episode(str(damaged), 0, out / "a.mp4")
    made = records()
    made[0].undecodable = "picture 5 cannot be decoded"
    monkeypatch.setattr(video_grid, "open_source", lambda *_, **__: MemorySource(made, config()))
    with pytest.raises(UserError, match="memory episode 0: picture 5 cannot be decoded"):
        write_episode("x", 0, out / "a.mp4")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episode("x", 1, out / "a.mp4", progress=interrupt)
    assert [p.name for p in out.iterdir()] == ["mine.mp4"] and (out / "mine.mp4").read_bytes() == b"mine"


def test_command(recorded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["data", "video", str(recorded["image"]), "--episode", "2", "-o", str(tmp_path / "a.mp4"), "--fps", "10"])
    assert f"a.mp4: {LENGTHS[2]} frames of 1280x" in capsys.readouterr().out
    with pytest.raises(UserError, match="a.mp4 exists"):
        cli.run(["data", "video", str(recorded["image"]), "--episode", "2", "-o", str(tmp_path / "a.mp4")])


def test_writer_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def some(count: int) -> Iterator[np.ndarray]:
        for i in range(count):
            yield np.full((32, 48, 3), 60 * i, np.uint8)

    with pytest.raises(RuntimeError), mp4_writer(path, 30) as write:
        for picture in some(3):
            write(picture)
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with mp4_writer(path, 30) as write:
        for picture in some(3):
            write(picture)
    assert [int(round(f.mean() / 60)) for f in decoded(path)] == [0, 1, 2]


def test_frames_are_drawn_quickly() -> None:
    """26 dimensions and three cameras of 640x480; a figure per frame would take a tenth of a second each."""
    scene, pictures = Scene(episode(SIZES["three"], 26), G1), [np.zeros((480, 640, 3), np.uint8)] * 3
    best = min(_seconds(scene, pictures) for _ in range(5))
    assert best < 0.05


def _seconds(scene: Scene, pictures: list[np.ndarray]) -> float:
    began = time.perf_counter()
    scene.frame(3, pictures)
    return time.perf_counter() - began
