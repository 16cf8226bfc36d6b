"""Batches straight from the tars of an export, read front to back as they come: from object stores, over HTTP, through pipes.

The shuffle is WebDataset's: the tars in an order drawn for each pass, dealt to the ranks, and a buffer of samples out of which one is drawn for
each that comes in. Which sample comes at which place depends on (seed, pass, rank, number of ranks) and the index of the export alone, so a
stream that is resumed on the same number of ranks goes on exactly: it reads the tars again of which something is still to come. On another
number of ranks that is not possible. Where tars are on this machine, `Loader(WebDatasetCache.open(FOLDER))` reads them at random instead, with
the mixture, orders and resumption of a cache.
"""

from __future__ import annotations

import contextlib
import itertools
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .augment import draw_variants
from .batches import Draws
from .delivery import BatchIterator
from .loader import ConditionMasking, require_variants
from .places import errors
from .sampling import mix, permute
from .shard import crc32c
from .webdataset_cache import WebDatasetCache

READ = 1 << 20          # bytes read at a time
DRAWN = 4096            # samples whose place is drawn in one go
Member = tuple[str, str]    # (tar, name in it)
Sample = tuple[int, int]    # (number of the tar in the index, number of the sample in it)


class TarStream(BatchIterator):
    """An endless iterator of this rank's batches, [batch_size] samples each, from an export at a folder, fsspec URL or pipe.

    The batches are those of `Loader` (see there for the arguments that have the same name), but the mixture is that of the tars:
    datasets by their size. Each pass gives every sample of the rank's tars exactly once. `buffer`: samples in memory, shuffled among
    themselves. The tables are copied to a temporary file in `scratch`. `UserError` for an export that is damaged, naming the tar, and
    for fewer tars than ranks."""

    def __init__(self, where: Path | str, *, batch_size: int, horizon: int = 16, seed: int = 0, buffer: int = 1000, rank: int = 0,
                 world_size: int = 1, start: int = 0, prefetch: int = 3, masking: ConditionMasking | None = None, augment: bool = False,
                 device: torch.device | str | None = None, scratch: Path | str = ".") -> None:
        if min(batch_size, horizon, prefetch, world_size, buffer) < 1 or not 0 <= rank < world_size or start < 0:
            raise UserError(f"batch size {batch_size}, horizon {horizon}, prefetch {prefetch}, buffer {buffer} must be at least 1, "
                            f"rank {rank} below world size {world_size}, start {start} at least 0")
        if start % world_size:
            raise UserError(f"start {start} is not that of a stream on {world_size} ranks: it goes on only on as many as it had; Loader, on a "
                            "cache or on an export in a folder, goes on on any number")
        self.cache, self.seed, self.masking = WebDatasetCache.open(where, scratch), seed, masking or ConditionMasking(0.0, 0.0, 0.0)
        if augment:
            require_variants(self.cache)
        self._tars = self.cache.shards
        if len(self._tars) < world_size:
            raise UserError(f"{where} has {len(self._tars)} tars for {world_size} ranks; export it with a smaller --shard-size")
        self.sizes = [sum(e["nsamples"] for e in self._tars if e["dataset"] == d.name) for d in self.cache.datasets]
        self._variants, self._buffer, self._world = self.cache.variants * augment, buffer, world_size
        self._by_name = {d.name: i for i, d in enumerate(self.cache.datasets)}
        self._samples = self._run(start // world_size)
        super().__init__(self.cache, batch_size, horizon, True, rank=rank, threads=1, prefetch=prefetch, start=start,
                         global_batch=batch_size * world_size, device=device, pinned=None)
        self._begin()

    def masked(self, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Loader.masked`."""
        return self.masking.draw(self.seed, self._positions(offset))

    def variants(self, offset: int) -> np.ndarray:
        """As `Loader.variants`."""
        return draw_variants(self.seed, self._positions(offset), self._variants)

    def close(self) -> None:
        """As `Loader.close`."""
        super().close()
        self._samples.close()

    def _flat(self, offset: int) -> torch.Tensor:
        dataset, row, held = [], [], self.cache.tars.held
        for _ in range(self._batch_size):
            d, r, members = next(self._samples)
            dataset.append(d)
            row.append(r)
            held |= members
        try:
            return self._assemble(Draws(np.array(dataset), np.array(row), *self.masked(offset), self.variants(offset)))
        finally:
            held.clear()

    def order(self, number: int) -> list[int]:
        """This rank's tars of a pass, in the order in which they are read."""
        n = len(self._tars)
        return permute(np.arange(n), n, mix(self.seed, 8, number)).tolist()[self._rank::self._world]

    def draws(self, number: int) -> Iterator[Sample]:
        """The samples of a pass, in the order of delivery."""
        key = mix(self.seed, 9, number, self._rank)
        coming = ((tar, i) for tar in self.order(number) for i in range(self._tars[tar]["nsamples"]))
        held = list(itertools.islice(coming, self._buffer))
        places = (at for first in itertools.count(0, DRAWN) for at in (mix(key, np.arange(first, first + DRAWN)) % self._buffer).tolist())
        for sample, at in zip(coming, places):
            yield held[at]
            held[at] = sample
        for at in permute(np.arange(len(held)), max(len(held), 1), mix(key, 0, 1)).tolist():
            yield held[at]

    def _run(self, skip: int) -> Generator[tuple[int, int, dict[Member, bytes]], None, None]:
        """(dataset, row, members) of the samples from the `skip`-th on, pass after pass."""
        number = 0
        while skip >= (size := sum(self._tars[tar]["nsamples"] for tar in self.order(number))):
            skip, number = skip - size, number + 1
        while True:
            draws = self.draws(number)
            gone = {next(draws) for _ in range(skip)}
            counts = {tar: self._tars[tar]["nsamples"] for tar in self.order(number)}
            for tar, _ in gone:
                counts[tar] -= 1
            gone = {sample for sample in gone if counts[sample[0]]}
            coming = ((tar, i, found) for tar in self.order(number) if counts[tar] for i, found in enumerate(self._read(self._tars[tar])))
            waiting: dict[Sample, tuple[int, int, dict[Member, bytes]]] = {}
            for sample in draws:
                while sample not in waiting:
                    tar, i, found = next(coming)
                    if (tar, i) not in gone:
                        waiting[tar, i] = found
                yield waiting.pop(sample)
            for _ in coming:        # to the end of the last tar, where its checksum is
                pass
            skip, number = 0, number + 1

    def _read(self, entry: dict[str, Any]) -> Iterator[tuple[int, int, dict[Member, bytes]]]:
        """(dataset, row, members by place) of the samples of one tar, which is checked when all of it was read."""
        name, tars = entry["url"], self.cache.tars
        with errors("read", tars.place.url(name)):
            file = _Summed(tars.place.open(name))
        key, count = "", 0
        members: dict[Member, bytes] = {}
        try:
            with file, tarfile.open(fileobj=file, mode="r|", bufsize=READ) as tar:  # type: ignore[call-overload]  # it only calls `read`
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, field = base.partition(".")
                    if members and f"{folder}/{stem}" != key:
                        yield self._sample(key, members)
                        members, count = {}, count + 1
                    key = f"{folder}/{stem}"
                    if field.startswith(("features.", "scales.", "json")):
                        data = tar.extractfile(member)
                        members[name, member.name] = data.read() if data and not field == "json" else b""
                file.rest()
        except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, IndexError) as error:
            raise tars.damaged(name, " ".join(str(error).split()) or type(error).__name__) from None
        if (file.nbytes, file.crc, count + 1) != (entry["filesize"], entry["crc32c"], entry["nsamples"]):
            raise tars.damaged(name, f"{file.nbytes} bytes with crc32c {file.crc:08x} and {count + 1} samples, {entry['filesize']} with "
                                     f"{entry['crc32c']:08x} and {entry['nsamples']} were written")
        yield self._sample(key, members)

    def _sample(self, key: str, members: dict[Member, bytes]) -> tuple[int, int, dict[Member, bytes]]:
        name, episode, step = key.rsplit("/", 2)
        d = self._by_name[name]
        return d, int(self.cache.datasets[d].episode_start[int(episode)]) + int(step), members


class _Summed:
    """A file that is read once, and what went by."""

    def __init__(self, file: Any) -> None:
        self._file, self.nbytes, self.crc = file, 0, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.nbytes, self.crc = self.nbytes + len(data), crc32c(data, self.crc)
        return data

    def rest(self) -> None:
        """Read to the end."""
        while self.read(READ):
            pass

    def __enter__(self) -> _Summed:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(*([Exception] if exc[0] else [])):     # a pipe complains when it is not read to its end
            self._file.close()
