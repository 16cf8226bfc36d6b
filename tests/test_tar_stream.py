"""Streaming an export: the batches are those of a cache, each sample once per pass, resumed exactly."""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from dvla.cache.loader import ConditionMasking, gather
from dvla.cache.places import Folder
from dvla.cache.store import Cache
from dvla.cache.tar_stream import TarStream
from dvla.errors import UserError
from dvla.stages.exchange import export

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_cache as synthetic  # noqa: E402


@pytest.fixture(scope="module", params=["fp16", "int8-zstd-stride2-variant"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Path]:
    base = tmp_path_factory.mktemp("stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        synthetic.build(base / "cache", plan=synthetic.make_plan(**synthetic.SETTINGS[request.param]))
        export(base / "cache", str(base / "tars"), shard_nbytes=100_000)
    return Cache.open(base / "cache"), base / "tars"


def samples(stream: TarStream, batches: int) -> list[tuple[int, int]]:
    return [pair for batch in itertools.islice(stream, batches) for pair in zip(batch.dataset.tolist(), batch.frame_index.tolist())]


def usable(cache: Cache) -> set[tuple[int, int]]:
    return {(d, row) for d, source in enumerate(cache.datasets) for row in source.frame_of(np.arange(source.observations)).tolist()
            if not source.quarantined[source.episode_of(np.array([row]))[0]]}


def test_batches_are_those_of_the_cache(stored: tuple[Cache, Path], tmp_path: Path) -> None:
    cache, tars = stored
    memory, name = fsspec.filesystem("memory"), f"/stream-{tars.parent.name}"
    memory.put(str(tars), name, recursive=True)
    masking = ConditionMasking(0.3, 0.3, 0.3)
    for where in (tars, f"memory:/{name}"):
        with TarStream(where, batch_size=7, horizon=4, seed=3, buffer=20, masking=masking, scratch=tmp_path) as stream:
            for step, batch in enumerate(itertools.islice(stream, 12)):
                expected = gather(cache, batch.dataset.numpy(), batch.frame_index.numpy(), 4, masked=stream.masked(7 * step))
                for field, value in vars(expected).items():
                    assert (value is None) == (getattr(batch, field) is None)
                    assert value is None or np.array_equal(value, getattr(batch, field)), field
    memory.rm(name, recursive=True)


def test_every_sample_once_per_pass_in_another_order(stored: tuple[Cache, Path]) -> None:
    cache, tars = stored
    whole = usable(cache)
    with TarStream(tars, batch_size=1, buffer=25) as stream:
        passes = [samples(stream, len(whole)) for _ in range(2)]
        assert sum(stream.sizes) == len(whole)
    assert all(set(part) == whole for part in passes) and passes[0] != passes[1]
    with TarStream(tars, batch_size=1, buffer=25, seed=1) as stream:
        assert samples(stream, len(whole)) not in passes
    parts = []
    for rank in range(2):
        with TarStream(tars, batch_size=1, buffer=25, rank=rank, world_size=2) as stream:
            parts.append(samples(stream, sum(stream._tars[tar]["nsamples"] for tar in stream.order(0))))
    assert set(parts[0]) | set(parts[1]) == whole and not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("batches", [1, 6, 19, 40])
def test_resume_goes_on_exactly(stored: tuple[Cache, Path], monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Also in a later pass; and only tars of which something is to come are read again."""
    tars, opened = stored[1], []
    with TarStream(tars, batch_size=5, buffer=12, rank=1, world_size=2) as stream:
        first, then = samples(stream, batches), samples(stream, 8)
        offset = stream.state_dict()["offset"] - 80
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, name: opened.append(name) or real(self, name))
    with TarStream(tars, batch_size=5, buffer=12, rank=1, world_size=2, start=offset) as stream:
        assert samples(stream, 8) == then and offset == 10 * batches
        order = [stream._tars[tar]["url"] for tar in stream.order(0)]
        remaining = set(itertools.islice(stream.draws(0), 5 * batches, None))
        if remaining:
            assert [name for name in opened if name in order][0] == next(stream._tars[tar]["url"] for tar in stream.order(0) if any(t == tar for t, _ in remaining))
    assert first


def test_damage_is_named(stored: tuple[Cache, Path], tmp_path: Path) -> None:
    shutil.copytree(stored[1], tmp_path / "tars")
    tar = sorted((tmp_path / "tars").glob("beta-*.tar"))[0]
    data = bytearray(tar.read_bytes())
    for bad in (data[:len(data) // 2], data[:-512], data[:3000] + b"\x07" + data[3001:], b""):
        tar.write_bytes(bytes(bad))
        with TarStream(tmp_path / "tars", batch_size=4, buffer=10) as stream, pytest.raises(UserError, match=f"{tar.name} is damaged"):
            samples(stream, 60)
    tar.unlink()
    with TarStream(tmp_path / "tars", batch_size=4, buffer=10) as stream, pytest.raises(UserError, match=f"cannot read .*{tar.name}"):
        samples(stream, 60)


def test_what_is_refused(stored: tuple[Cache, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tars for 500 ranks; export it with a smaller"):
        TarStream(stored[1], batch_size=4, world_size=500)
    with pytest.raises(UserError, match="no export at"):
        TarStream(tmp_path, batch_size=4)
    with pytest.raises(UserError, match="must be at least 1"):
        TarStream(stored[1], batch_size=0)
    with pytest.raises(UserError, match="goes on only on as many"):
        TarStream(stored[1], batch_size=5, world_size=2, start=15)
    if not stored[0].variants:
        with pytest.raises(UserError, match="--augment"):
            TarStream(stored[1], batch_size=4, augment=True)
