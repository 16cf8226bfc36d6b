"""`Source.load`: only the views asked for are opened, and each view's files are read again only after they changed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dvla.cache.readers import Source, open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import Failed
from support.lerobot_samples import rewrite, the_file, with_column

CopyOf = Callable[[str], Path]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """How often each (episode, view) is looked for in files."""
    counted: Counter[tuple[int, str]] = Counter()

    def watch(source: Source) -> None:
        real = source._views

        def views(episode_id, names, table, where):  # type: ignore[no-untyped-def]
            counted.update((episode_id, name) for name in names)
            return real(episode_id, names, table, where)

        monkeypatch.setattr(source, "_views", views)

    counted.watch = watch  # type: ignore[attr-defined]
    return counted


@pytest.mark.parametrize("kind", ["hevc", "image"])
def test_a_view_is_looked_for_once(copy_of: CopyOf, count: Counter, kind: str) -> None:
    source = open_source(copy_of(kind))
    count.watch(source)
    first = [source.load(n) for n in source.episode_ids]
    again = [source.load(n, views=("wrist",)) for n in source.episode_ids]
    assert set(count.values()) == {1} and len(count) == 2 * len(first)
    for one, other in zip(first, again):
        assert [v.name for v in other.views] == ["wrist"] and other.views[0] == one.views[1]
        assert other.source_hash == "" and np.array_equal(other.action, one.action)
        np.testing.assert_array_equal(next(other.views[0].frames(3)), next(one.views[1].frames(3)))


def test_it_is_looked_for_again_after_a_change(copy_of: CopyOf, count: Counter) -> None:
    root = copy_of("hevc")
    source = open_source(root)
    count.watch(source)
    before = source.load(1)
    path = sorted(root.glob("videos/*front/*/*.mp4"))[1]
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert source.load(1).source_hash == before.source_hash and count == {(1, "front"): 2, (1, "wrist"): 1}
    path.write_bytes(sorted(root.glob("videos/*front/*/*.mp4"))[2].read_bytes())
    after = source.attempt(source.load, 1)
    assert isinstance(after, Failed) or after.views[0].sha256 != before.views[0].sha256
    assert count == {(1, "front"): 3, (1, "wrist"): 1}


def test_other_timestamps_are_other_frames(copy_of: CopyOf, count: Counter) -> None:
    """Which frames of a file are an episode's depends on its table."""
    root = copy_of("h264")
    source = open_source(root)
    count.watch(source)
    source.load(1)
    rewrite(
        the_file(root, "data/*/*.parquet"),
        lambda table: with_column(table, "timestamp", [t * 1.001 for t in table["timestamp"].to_pylist()]),
    )
    source.load(1)
    assert set(count.values()) == {2}


def test_only_what_is_asked_for_is_opened(copy_of: CopyOf) -> None:
    root = copy_of("hevc")
    whole = open_source(root).load(1)
    hashes = {v.name: v.sha256 for v in whole.views}
    sorted(root.glob("videos/*wrist/*/*.mp4"))[1].unlink()
    source = open_source(root)
    episode = source.load(1, views=("front",), hashes={"wrist": hashes["wrist"]})
    assert episode.source_hash == whole.source_hash and [v.name for v in episode.views] == ["front"]
    assert source.load(1, ("front",), {"wrist": "another"}).source_hash != whole.source_hash
    with pytest.raises(CorruptEpisode) as caught:
        source.load(1)
    assert caught.value.kind == "missing-file"
    failed = source.attempt(source.load, 1)
    assert isinstance(failed, Failed) and str(failed) == str(caught.value)
    assert (failed.episode, failed.where, failed.kind, failed.rows) == (1, "hevc episode 1", "missing-file", 0)
    assert failed.reason.startswith("videos/observation.images.wrist/")
