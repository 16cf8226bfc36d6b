"""What was never fetched, fetched in part, or given a folder too high or too low: each gives its remedy in one line."""

import shutil
import tarfile
import zipfile

import pytest

from dvla.cache.readers import open_source
from dvla.errors import Failed, UserError
from support.hdf5_samples import write_robomimic
from support.lerobot_written import LENGTHS, POINTER, write_v2, write_v3


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# --- pointers ---


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_v2, "meta/info.json"),
        (write_v2, "meta/tasks.jsonl"),
        (write_v2, "meta/episodes.jsonl"),
        (write_v3, "meta/tasks.parquet"),
        (write_v3, "meta/episodes/chunk-000/file-000.parquet"),
    ],
)
def test_a_pointer_in_meta_is_named(tmp_path, write, name):
    root = write(tmp_path / "d")
    (root / name).write_bytes(POINTER)
    assert "is a Git LFS pointer, not the file itself; run git lfs pull" in refusal(root)


def test_a_pointer_costs_its_episode(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / "data/chunk-000/episode_000000.parquet").write_bytes(POINTER)
    source = open_source(root)
    failed = source.attempt(source.load, 0)
    assert isinstance(failed, Failed) and "episode_000000.parquet is a Git LFS pointer" in failed.reason
    assert source.load(1).length == LENGTHS[1]
    assert [n.text.partition(";")[0] for n in source.notes()] == ["2 of 3 episodes present: 2 tables"]


def test_a_pointer_instead_of_hdf5_is_named(tmp_path):
    path = write_robomimic(tmp_path / "can" / "image.hdf5")
    path.write_bytes(POINTER)
    assert "image.hdf5 is a Git LFS pointer" in refusal(path)
    path.rename(path.with_name("demos.npz"))
    assert "holds demos.npz, which is a Git LFS pointer" in refusal(path.parent)


# --- a part of a dataset ---


def test_how_many_episodes_are_here(tmp_path):
    root = write_v2(tmp_path / "d")
    assert not open_source(root).notes()
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    source = open_source(root)
    (note,) = source.notes()
    assert note.rule == "partly-present" and note.text.startswith("2 of 3 episodes present: 2 tables; fetch the others")
    shutil.rmtree(root / "data")
    assert "(0 of 3 episodes present: 0 tables; it lists no episodes); x" in str(source.no_usable_episode([], "x"))


def test_a_download_that_was_not_finished(tmp_path):
    root = write_v2(tmp_path / "d")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    unfinished = root / ".cache/huggingface/download/data/chunk-000"
    unfinished.mkdir(parents=True)
    (unfinished / "Yx3=.4d7a.incomplete").write_bytes(b"PAR1")
    source = open_source(root)
    failed = source.attempt(source.load, 1)
    assert failed.kind == "missing-file" and "was not downloaded to its end; rerun hf download" in failed.reason


def test_offline_what_is_not_in_the_cache_costs_its_episode(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    root = write_v2(tmp_path / "0123abcd")
    (root / "data/chunk-000/episode_000001.parquet").unlink()

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("it is not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(root))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["meta/info.json"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    source = open_source("owner/push")
    with pytest.raises(UserError, match="it is not in the cache, and the hub cannot be reached"):
        source.load(1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    failed = source.attempt(source.load, 1)
    assert isinstance(failed, Failed) and "is not in the hub's cache, and HF_HUB_OFFLINE is set" in failed.reason
    assert source.load(2).length == LENGTHS[2]


def test_a_link_into_a_cache_that_is_gone(tmp_path):
    root = write_v2(tmp_path / "d")
    path = root / "data/chunk-000/episode_000002.parquet"
    path.unlink()
    path.symlink_to(tmp_path / "blobs/4d7a")
    source = open_source(root)
    failed = source.attempt(source.load, 2)
    assert failed.kind == "missing-file" and "is a link to a file that is not there" in failed.reason
    assert source.notes()[0].text.startswith("2 of 3 episodes present")
    (root / "meta/info.json").unlink()
    (root / "meta/info.json").symlink_to(tmp_path / "blobs/77")
    assert "info.json is a link to a file that is not there" in refusal(root)


# --- the wrong folder ---


@pytest.mark.parametrize(
    "inside", ["meta", "data", "data/chunk-000", "meta/info.json", "data/chunk-000/episode_000000.parquet"]
)
def test_one_level_too_low(tmp_path, inside):
    root = write_v2(tmp_path / "d")
    assert refusal(root / inside).endswith(f"is inside a dataset; give {root}")


def test_one_or_two_levels_too_high(tmp_path):
    root = write_v2(tmp_path / "owner/name/d")
    for path in (root.parent, root.parent.parent):
        assert refusal(path).endswith(f"is not itself a dataset but holds a dataset; give {root}")
    write_v2(tmp_path / "owner/name/e")
    assert refusal(root.parent).endswith(f"holds 2 datasets; give one of them, e.g. {root}")


def test_a_folder_of_the_hub_cache(tmp_path):
    root = write_v2(tmp_path / "datasets--owner--name/snapshots/0123abcd")
    (root.parent.parent / "refs").mkdir()
    assert refusal(root.parent.parent).endswith(f"give {root}")


def test_a_packed_dataset(tmp_path):
    root = write_v2(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as packed:
        packed.write(root / "meta/info.json", "d/meta/info.json")
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as packed:
        packed.add(root, "d")
    for name in ("d.zip", "d.tar.gz"):
        assert f"{name} is an archive without RLBench episodes or a Zarr buffer; extract it" in refusal(tmp_path / name)


def test_a_folder_with_an_archive_alone(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/push.tar.gz").write_bytes(b"\x1f\x8b")
    assert "holds an archive, push.tar.gz, and no dataset" in refusal(tmp_path / "d")


def test_other_folders_that_look_like_a_dataset(tmp_path):
    (tmp_path / "old/meta_data").mkdir(parents=True)
    (tmp_path / "old/meta_data/info.json").write_text("{}")
    assert "is a LeRobot dataset of version 1" in refusal(tmp_path / "old")
    root = write_v2(tmp_path / "d")
    (root / "meta/info.json").unlink()
    assert "is a LeRobot dataset without its meta/info.json" in refusal(root)
