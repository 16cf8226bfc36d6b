"""Damaged, odd and missing LeRobot datasets: each gives one clear line, and nothing else is lost."""

import json
import shutil
import subprocess
import sys

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source, video
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import UserError
from support.lerobot_samples import FPS, LENGTHS, config_for, rewrite, the_file, with_column

pytest.importorskip("lerobot", reason="lerobot is an optional dependency: pip install 'dvla[lerobot]'")


# --- damage --------------------------------------------------------------------------------------------------------


def cut(path, fraction):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def drop_column(name):
    return lambda root: rewrite(the_file(root, "data/*/*.parquet"), lambda t: t.drop_columns([name]))


def nan_action(root):
    def change(table):
        action = table["action"].to_pylist()
        action[13][2] = float("nan")  # frame 3 of episode 1
        return with_column(table, "action", action)

    rewrite(the_file(root, "data/*/*.parquet"), change)


def null_picture(root):
    def change(table):
        pictures = table["observation.images.wrist"].to_pylist()
        pictures[14] = None
        return with_column(table, "observation.images.wrist", pictures)

    rewrite(the_file(root, "data/*/*.parquet"), change)


def remove_rows(root):
    rewrite(the_file(root, "data/*/*.parquet"), lambda t: pa.concat_tables([t.slice(0, 15), t.slice(16)]))


def shorter_video(root):
    """The file of episode 1 (13 rows) is replaced by that of episode 0 (10 frames)."""
    short, long = sorted(root.glob("videos/*wrist/*/*.mp4"))[:2]
    long.write_bytes(short.read_bytes())


def garbage(root, pattern):
    the_file(root, pattern).write_bytes(b"not a file of this kind" * 50)


DAMAGE = {  # name: (dataset, how, message about episode 1)
    "mp4 without its end": (
        "hevc",
        lambda r: cut(the_file(r, "videos/*front/*/*.mp4", 1), 0.6),
        "file-001.mp4 (is cut off|has no frame|cannot be)",
    ),
    "mp4 without its beginning": (
        "h264",
        lambda r: garbage(r, "videos/*front/*/*.mp4"),
        "file-000.mp4 cannot be read as video",
    ),
    "mp4 missing": (
        "h264",
        lambda r: shutil.rmtree(r / "videos/observation.images.wrist"),
        "wrist/chunk-000/file-000.mp4 is missing",
    ),
    "video shorter than the table": ("hevc", shorter_video, "file-001.mp4 has 10 frames for 13 rows"),
    "parquet without footer": (
        "image",
        lambda r: cut(the_file(r, "data/*/*.parquet"), 0.9),
        "file-000.parquet cannot be read as parquet",
    ),
    "parquet missing": ("image", lambda r: shutil.rmtree(r / "data"), "data/chunk-000/file-000.parquet is missing"),
    "NaN action": ("image", nan_action, "column 'action' is nan at frame 3, dimension 2"),
    "row missing": ("image", remove_rows, "has 12 rows, meta/ lists 13"),
    "image missing": ("image", null_picture, "'observation.images.wrist' holds no image bytes"),
    "action column missing": ("image", drop_column("action"), "column 'action' is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(copy_of, name):
    kind, harm, message = DAMAGE[name]
    root = copy_of(kind)
    harm(root)
    with pytest.raises(CorruptEpisode, match=message) as caught:
        open_source(root).load(1)
    assert str(caught.value).startswith(f"{kind} episode 1: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["video shorter than the table", "NaN action", "row missing", "image missing"])
def test_damage_to_one_episode_leaves_the_others(copy_of, recorded, name):
    kind, harm, _ = DAMAGE[name]
    root = copy_of(kind)
    harm(root)
    for number in (0, 2):
        assert open_source(root).load(number).source_hash == open_source(recorded[kind]).load(number).source_hash


def test_damage_found_only_by_decoding(copy_of):
    """Cut data of one image: the frames before it arrive, then `CorruptEpisode`, never a wrong image in silence."""
    root = copy_of("image")

    def change(table):
        pictures = table["observation.images.front"].to_pylist()
        pictures[15]["bytes"] = pictures[15]["bytes"][:60]  # frame 5 of episode 1: header intact, data cut
        return with_column(table, "observation.images.front", pictures)

    rewrite(the_file(root, "data/*/*.parquet"), change)
    frames, seen = open_source(root).load(1).views[0].frames(), []
    with pytest.raises(CorruptEpisode, match="episode 1: image 5 of 'observation.images.front' cannot be decoded"):
        seen.extend(frames)
    # a generator that raised has delivered what came before
    assert [f.shape for f in open_source(root).load(1).views[0].frames(0, 5)] == [(64, 64, 3)] * 5


def test_video_damage_found_only_by_decoding(copy_of):
    root = copy_of("h264")
    path = the_file(root, "videos/*front/*/*.mp4")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
        spot = next(p for p in packets if p.pts * p.time_base >= (LENGTHS[0] + 4) / FPS and p.is_keyframe)
        position, size = spot.pos, spot.size
    data = bytearray(path.read_bytes())
    data[position + 4 : position + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    with pytest.raises(CorruptEpisode, match="h264 episode 1: (frame|file-000.mp4)"):
        list(open_source(root).load(1).views[0].frames())
    assert len(list(open_source(root).load(0).views[0].frames())) == LENGTHS[0]


# --- refusals at the door ------------------------------------------------------------------------------------------


def edit_info(root, **changes):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, **changes}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda r: (r / "meta/info.json").unlink(), "is a LeRobot dataset without its meta/info.json"),
        (lambda r: (r / "meta/info.json").write_text("{"), "cannot be read as JSON"),
        (lambda r: edit_info(r, codebase_version="v1.6"), "version v1.6 is not readable"),
        (lambda r: edit_info(r, fps=None), "'fps' is missing"),
        (lambda r: edit_info(r, robot_type="toaster"), "no dataset config fits"),
        (lambda r: edit_info(r, data_path="data/{episode_chunk}.parquet"), "data_path .* does not fit v3.0"),
        (lambda r: edit_info(r, video_path="../{video_key}/{chunk_index}-{file_index}.mp4"), "leaves its folder"),
        (lambda r: (shutil.rmtree(r / "meta/episodes"), shutil.rmtree(r / "data")), "was the recording finalized"),
        (lambda r: cut(r / "meta/tasks.parquet", 0.5), "tasks.parquet cannot be read as parquet"),
    ],
)
def test_unusable_datasets_are_refused(copy_of, harm, message):
    root = copy_of("h264")
    harm(root)
    with pytest.raises(UserError, match=message) as caught:
        open_source(root)
    assert "\n" not in str(caught.value)


def test_missing_path_and_unknown_episode(recorded, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no episode 7; it lists 3, 0 to 2"):
        open_source(recorded["image"]).load(7)


def test_hub_dataset_is_fetched_file_by_file(recorded, tmp_path, monkeypatch):
    """`meta/` at opening, then only the files an episode needs, all from the commit found first."""
    import huggingface_hub

    commit, remote, asked = tmp_path / "0123abcd", recorded["h264"], []

    def snapshot(repo, repo_type, revision, allow_patterns):
        assert (repo, repo_type, revision, allow_patterns) == ("owner/push", "dataset", "v3.0", ["meta/**"])
        shutil.copytree(remote / "meta", commit / "meta")
        return str(commit)

    def fetch(repo, filename, repo_type, revision):
        assert revision == "0123abcd"
        asked.append(filename)
        if "wrist" in filename:
            raise huggingface_hub.errors.EntryNotFoundError("404")
        (commit / filename).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / filename, commit / filename)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, repo_type, revision: ["meta/info.json"]
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    source = open_source("owner/push@v3.0", config_for(("front",)))
    assert source.name == "push" and not asked
    episode = source.load(0)
    assert len(list(episode.views[0].frames())) == LENGTHS[0]
    assert asked == ["data/chunk-000/file-000.parquet", "videos/observation.images.front/chunk-000/file-000.mp4"]
    shutil.rmtree(commit)
    with pytest.raises(CorruptEpisode, match="push episode 0: .*wrist.* is missing from 'owner/push'"):
        open_source("owner/push@v3.0").load(0)


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'owner/push' is not a local folder and could not be .*: no route to host$"):
        open_source("owner/push")


def test_libav_never_logs_through_python(copy_of):
    """Its threads would need the interpreter lock, which is held while a codec's threads are joined: a deadlock."""
    path = the_file(copy_of("h264"), "videos/*front/*/*.mp4")
    cut(path, 0.1)

    def logged(opening):
        with av.logging.Capture() as lines, pytest.raises((CorruptEpisode, av.FFmpegError)):
            opening()
        return lines

    av.logging.set_level(av.logging.DEBUG)  # as other libraries leave it
    assert logged(lambda: av.open(str(path)))
    assert not logged(lambda: video.find_extent(path, np.arange(3) / 20, "here"))


FOOTERS = """
import sys
from pathlib import Path
from dvla.cache.readers.lerobot.parquet import RowsAt, read_rows
path = Path(sys.argv[1])
data = path.read_bytes()
length = int.from_bytes(data[-8:-4], "little")
for at in range(len(data) - 8 - length, len(data) - 8):
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    try:
        read_rows(RowsAt(path, 1), ["episode_index"], "here")
    except Exception:
        pass
"""


def test_no_damage_of_a_footer_ends_the_process(tmp_path):
    """pyarrow calls std::terminate when damaged statistics of a column are asked for."""
    table = pa.table({"episode_index": [0, 0, 1, 1, 2, 2]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    done = subprocess.run([sys.executable, "-c", FOOTERS, tmp_path / "rows.parquet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
