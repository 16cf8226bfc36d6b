"""`dvla cache push` and `pull`: a finished cache to an object store or the Hugging Face hub, and back, file by file.

The manifest goes last, so that an unfinished copy is not taken for a cache. A marker, put first and removed at the end,
tells whose files are there, so that both directions resume. `dvla train --from-cache URL --local-cache FOLDER` reads
what was pushed without pulling it.

    URL/.pushing        crc32c of the manifest whose files are on their way
    OUT/.pulling        the same, and where they come from
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....cache.store.cache import Cache
from ....cache.store.checksums import damaged_files, incomplete
from ....cache.store.locations import BLOCK, Url, creating, errors
from ....cache.store.manifest import MANIFEST, has_size, parse_manifest, read_fingerprint
from ....cache.store.mirror import fetch_checked, fetch_manifest, is_remote
from ....common.documents import open_regular, read_file
from ....common.files import crc32c, write_file
from ....common.hub import DATASETS, dataset_url, hub_errors
from ....common.progress import Count
from ....common.text import public
from ....errors import UserError
from .card import cache_card

PUSHING, PULLING = ".pushing", ".pulling"
THREADS = 8


@dataclass(frozen=True)
class Transfer:
    """What was copied."""

    where: str
    files: int  # of the cache
    found: int  # of them, there already
    nbytes: int  # of the cache


def push_cache(path: Path | str, url: str, private: bool = True, progress: Count = lambda *_: None) -> Transfer:
    """Copy the finished cache at `path` to an fsspec URL (s3://…, gs://…) or a dataset repository of the hub.

    A repository ("owner/name", or hf://datasets/owner/name) is created if needed, `private` or not.

    `UserError` when `path` is no finished cache, another one lies at `url`, or a file cannot be written.
    """
    cache, repo = Cache.open(path), dataset_url(url)
    if repo is not None and "@" not in url and not Path(url).parent.exists():  # "backup/cache" may be meant as a folder
        url = repo
    if not is_remote(url):
        raise UserError(
            f"{url} is not a URL; give one like s3://bucket/cache or {DATASETS}owner/name (copy to a folder with cp)"
        )
    root, files = cache.path, cache.manifest["files"]
    if lacking := incomplete(root, cache.manifest, cache.fingerprint):
        raise UserError(f"run `dvla cache repair {root}` first: {': '.join(lacking[0])}")
    if url.startswith(DATASETS):
        return _push_to_hub(cache, url, private, progress)
    data = read_file(root / MANIFEST)
    place, mine = Url(url), f"{crc32c(data):08x}"
    if place.size(MANIFEST) is not None:
        if fetch_manifest(place) == data:
            return Transfer(url, len(files), len(files), _total(files))
        raise UserError(f"{url} holds another cache; choose another URL, or remove that cache first")
    names = place.names()
    if PUSHING not in names and names:
        raise UserError(f"{url} holds files that are no cache ({names[0]}, …); choose another URL")
    if PUSHING in names:
        with place.open(PUSHING) as file:
            if file.read(len(mine) + 1) != mine.encode():
                raise UserError(f"another cache is being pushed to {url}; choose another URL, or remove what is there")
    else:
        _put(place, PUSHING, mine.encode())

    def send(name: str) -> bool:
        if place.size(name) == files[name]["bytes"]:
            return True  # an object appears when it is complete
        with errors("read", str(root / name)):
            file = open(open_regular(root / name), "rb")
        with creating(place, name) as sink, file:
            while block := file.read(8 * BLOCK):
                sink.write(block)
            if (sink.nbytes, sink.crc) != (files[name]["bytes"], files[name]["crc32c"]):
                raise UserError(f"{root / name} is damaged; run `dvla cache repair {root}`, then push again")
        return False

    found = _all(send, files, progress)
    _put(place, MANIFEST, data)
    place.remove(PUSHING)
    return Transfer(url, len(files), found, _total(files))


def pull_cache(url: str, out: Path | str, progress: Count = lambda *_: None) -> Transfer:
    """Copy the cache at a URL, or "owner/name[@revision]" of the hub, into the folder `out`.

    Every file is compared with the manifest's size and crc32c.

    `UserError` when none is there, a file is damaged, or `out` holds something else.
    """
    out, url = Path(out), dataset_url(url) or url
    place = Url(url)
    data = fetch_manifest(place)
    files = parse_manifest(data, url)["files"]
    marker, mine = out / PULLING, f"{crc32c(data):08x} {public(url)}\n".encode()
    if (out / MANIFEST).is_file() and read_file(out / MANIFEST) == data:
        return Transfer(url, len(files), len(files), _total(files))
    if out.exists() and not (marker.is_file() and read_file(marker).split()[:1] == mine.split()[:1]):
        raise UserError(f"{out} exists and is not an unfinished copy of {url}; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(marker, mine)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None

    reused: list[str] = []

    def take(name: str) -> bool:
        path = out / name
        if has_size(path, files[name]):
            reused.append(name)
            return True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; remove {out} and pull again") from None
        fetch_checked(place, name, files[name], path)
        return False

    found = _all(take, files, progress)
    for name in damaged_files(out, {name: files[name] for name in reused}):
        fetch_checked(place, name, files[name], out / name)
        found -= 1
    if lacking := incomplete(out, parse_manifest(data, url), read_fingerprint(out)):
        raise UserError(f"{url} is no whole cache ({': '.join(lacking[0])}); repair the original and push it again")
    write_file(out / MANIFEST, data)
    marker.unlink()
    return Transfer(url, len(files), found, _total(files))


def _push_to_hub(cache: Cache, url: str, private: bool, progress: Count) -> Transfer:
    """With the hub client's own resumable upload; the manifest and the card come last."""
    repo = url.removeprefix(DATASETS)
    card = cache_card(cache, repo).encode()
    root, files = cache.path, cache.manifest["files"]
    with hub_errors(repo):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if api.file_exists(repo, MANIFEST, repo_type="dataset"):
            raise UserError(f"{repo} holds a cache already; choose another repository, or delete it on the hub first")
        api.upload_large_folder(
            repo_id=repo, folder_path=root, repo_type="dataset", allow_patterns=list(files), print_report=False
        )
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo, repo_type="dataset")
        api.upload_file(path_or_fileobj=root / MANIFEST, path_in_repo=MANIFEST, repo_id=repo, repo_type="dataset")
    progress(_total(files), _total(files))
    return Transfer(url, len(files), 0, _total(files))


def _all(work: Callable[[str], bool], files: Mapping[str, Mapping[str, Any]], progress: Count) -> int:
    """`work` on every file, a few at a time and not far ahead of the progress; returns how many were there already."""
    total, done, found = _total(files), 0, 0
    with ThreadPoolExecutor(THREADS) as pool:
        names, begun = iter(files), deque[tuple[str, Future[bool]]]()
        try:
            while True:
                begun += [(name, pool.submit(work, name)) for name in itertools.islice(names, 2 * THREADS - len(begun))]
                if not begun:
                    break
                name, task = begun.popleft()
                found += task.result()
                done += files[name]["bytes"]
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _put(place: Url, name: str, data: bytes) -> None:
    with creating(place, name) as sink:
        sink.write(data)


def _total(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files.values())
