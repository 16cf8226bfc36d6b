"""Delivery of batches on a device: on a CUDA device when there is one, and its order of work with streams that only
keep a record."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla.cache.loader import prefetch as delivery
from dvla.cache.loader.loader import Loader
from dvla.cache.store.cache import Cache
from dvla.errors import UserError
from support import synthetic_cache as synthetic

STEPS = 24


@pytest.fixture(scope="module", params=["fp16", "int8-variants"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("device") / "cache"
    synthetic.build(path, plan=synthetic.make_plan(**synthetic.SETTINGS[request.param]))
    return Cache.open(path)


def values(batch: Any) -> dict[str, torch.Tensor]:
    return {n: v.cpu().clone() for n, v in vars(batch).items() if v is not None}


def on_host(cache: Cache) -> list[dict[str, torch.Tensor]]:
    with Loader(cache, batch_size=8, seed=4) as loader:
        return [values(next(loader).batch) for _ in range(STEPS)]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_batches_are_decoded_on_the_cpu(cache: Cache, device: Any) -> None:
    with Loader(cache, batch_size=8, seed=4, device=device) as loader:
        for expected in on_host(cache):
            batch = next(loader).batch
            assert (
                batch.tokens.dtype == batch.text.dtype == torch.float16
                and batch.token_scale is None
                and batch.channel_scale is None
            )
            assert_same(values(batch), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_cuda_device(cache: Cache) -> None:
    """Each batch is used by slow work on the current stream, kept for a while, and still what it was."""
    busy, kept = torch.randn(2048, 2048, device="cuda"), []
    with Loader(cache, batch_size=8, seed=4, threads=3, device="cuda") as loader:
        for step in range(STEPS):
            batch = next(loader).batch
            assert all(v is None or v.is_cuda for v in vars(batch).values())
            for _ in range(20):
                busy = busy @ busy / busy.norm()
            kept.append((batch.tokens.double().sum(), batch.action.double().sum(), batch if step % 5 == 0 else None))
            assert loader.state_dict() == {"offset": 8 * (step + 1)}
    for (tokens, action, batch), expected in zip(kept, on_host(cache)):
        assert tokens.item() == expected["tokens"].double().sum().item() or cache.format.quantized
        assert abs(action.item() - expected["action"].double().sum().item()) < 1e-9
        if batch is not None and not cache.format.quantized:
            assert_same(values(batch), expected)


class Record:
    """Streams and events that do nothing but write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.current, self.finished, record = "main", set(), self

        class Event:
            def record(self, stream: Any = None) -> None:
                record.log.append(("record", self, stream.name if stream else record.current))

            def query(self) -> bool:
                return self in record.finished

        class Stream:
            def __init__(self, device: Any = None, name: str = "side") -> None:
                self.name, self.device = name, torch.device("cpu")  # where copies go

            def wait_event(self, event: Any) -> None:
                record.log.append(("wait", event, self.name))

            def synchronize(self) -> None:
                record.log.append(("synchronize", self.name))

        self.Event, self.Stream = Event, Stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def current_stream(self, device: Any = None) -> Any:
        return self.Stream(name=self.current)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    made, zeros = Record(), torch.zeros
    for name in ("Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kw: zeros(*args, **kw))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: made.log.append(("used", self.data_ptr(), stream.name))
    )
    return made


def test_the_next_batch_is_copied_while_one_is_in_use(cache: Cache, record: Record) -> None:
    expected = on_host(cache)
    with Loader(cache, batch_size=8, seed=4, device="cuda", prefetch=3) as loader:
        for step in range(STEPS):
            for future in list(loader._batches._coming)[:2]:
                future.result()  # the disk is fast
            begun = len(record.log)
            sample = next(loader)
            asked = record.log[begun:]
            assert len(loader._batches._side) == 1  # the one after it is on its way
            waited = [event for what, event, *_ in asked if what == "wait"]
            recorded = [event for what, event, *where in record.log if what == "record" and where == ["side"]]
            # the main stream waits for this batch's own last event, and both memories are marked as used by it
            assert len(waited) == 1 and recorded.index(waited[0]) == 2 * step + 1
            assert [(what, where) for what, _, where in asked if what == "used"] == [("used", "main")] * 2
            assert not [entry for entry in asked if entry[0] == "record" and entry[2] == "main"]
            assert (sample.offset, sample.next_offset) == (8 * step, 8 * (step + 1))
            assert_same(values(sample.batch), expected[step])
    assert ("synchronize", "side") in record.log


def test_a_buffer_is_not_filled_again_before_its_copy_is_over(cache: Cache, record: Record) -> None:
    with Loader(cache, batch_size=8, seed=4, device="cuda", prefetch=3) as loader:
        for _ in range(10):
            next(loader)
        copying = [flat.data_ptr() for flat, _ in loader._batches._side._copying]
        assert len(copying) >= 10 and len(set(copying)) == len(
            copying
        )  # no copy has ended: each has a buffer of its own
        assert loader._assemble.pool.empty()
        record.finished |= {event for what, event, *_ in record.log if what == "record"}
        loader._batches._coming[0].result()  # so that another copy begins
        next(loader)
        assert len(loader._batches._side._copying) <= 2
        free = []
        while not loader._assemble.pool.empty():
            free.append(loader._assemble.pool.get())
        assert len(free) >= 6  # they are back, without an event of their own to wait for
        assert all(storage._event is None for storage in free)


def test_an_error_ahead_waits_for_its_turn(tmp_path: Path, record: Record) -> None:
    synthetic.build(tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    shard = cache.named("beta").shard_path("top", 2)
    shard.write_bytes(shard.read_bytes()[:-9])
    counts = []
    for device in (None, "cuda"):
        counts.append(0)
        with Loader(cache, batch_size=8, seed=4, device=device) as loader:
            for _ in range(2):
                with pytest.raises(UserError, match=str(shard)):
                    while True:
                        next(loader)
                        counts[-1] += 1
    assert counts[0] == counts[1]


def test_a_device_without_room_leaves_no_batch_out(
    cache: Cache, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes room and asks again gets the batch that did not fit; its buffer is kept until the copy that had
    begun is over."""
    expected, real, fits = on_host(cache), delivery.decoded, [True] * 4 + [False] + [True] * 99
    with Loader(cache, batch_size=8, seed=4, device="cuda") as loader:

        def decoded(batch: Any) -> Any:
            if not fits.pop(0):
                assert len({flat.data_ptr() for flat, _ in loader._batches._side._copying}) == 5
                raise torch.cuda.OutOfMemoryError
            return real(batch)

        monkeypatch.setattr(delivery, "decoded", decoded)
        found = []
        while len(found) < 12:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                sample = next(loader)
                assert sample.offset == 8 * len(found)
                found.append(values(sample.batch))
    assert fits[0] and len(fits) < 99
    for a, b in zip(found, expected):
        assert_same(a, b)
