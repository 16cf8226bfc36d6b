"""What is there of a LeRobot dataset: episodes found by their files, and how many of the listed ones have theirs."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ....errors import Note, UserError
from ..location import Location, absence, unreadable
from ..video import frames_listed
from .listing import EpisodeEntry, Listing, Paths
from .parquet import DAMAGE, open_file

ANY_CHUNK = re.compile(r"\bchunk-\d+")  # a chunk's folder in a path


def recover_episodes(location: Location, paths: Paths, is_v3: bool, fps: float, listing: Listing) -> None:
    """Fill `listing` from the data files, where meta/ has no list of episodes. `UserError` when they do not tell."""
    missing = "meta/episodes holds no parquet file" if is_v3 else "meta/episodes.jsonl is missing or empty"
    names = [] if location.hub_id else location.names(paths.data.glob())
    if not names:
        remedy = "fetch the whole dataset" if not is_v3 else "was the recording finalized?"
        raise UserError(f"{location.given}: {missing}, and no data file of it is here; {remedy}")
    if is_v3:
        _recover_v3(location, paths, names, fps, missing, listing)
    else:
        for name in names:
            fields = paths.data.match(name)
            if not fields.get("episode_index", "").isdecimal():
                raise UserError(f"{location.given}: {missing}, and {name} does not name its episode; fetch meta/ again")
            episode = int(fields["episode_index"])
            try:
                with open_file(location.root / name) as file:
                    listing.entries[episode] = paths.entry_v2(episode, file.metadata.num_rows, ())
            except DAMAGE as error:
                reason = unreadable(location.root / name, "parquet", error)
                listing.damaged[episode] = "unreadable-file", reason
    count = len(listing.entries) + len(listing.damaged)
    listing.notes.append(Note("list-missing", f"{missing}; {count} episodes were found by the data files"))


def _recover_v3(
    location: Location, paths: Paths, names: Sequence[str], fps: float, missing: str, listing: Listing
) -> None:
    """Episodes in the order of their rows; those of a video file follow each other as their rows do."""
    videos: dict[str, str] = {}
    for key in paths.video_keys if paths.video else ():
        files = location.names(paths.video.glob(video_key=key))  # type: ignore[union-attr]
        if len(files) != 1:
            raise UserError(
                f"{location.given}: {missing}, and '{key}' has {len(files)} video files, so their episodes are not "
                "known; was the recording finalized?"
            )
        videos[key] = files[0]
    row = 0
    for name in names:
        try:
            with open_file(location.root / name) as file:
                ids = file.read(columns=["episode_index"])["episode_index"].to_numpy()
        except DAMAGE as error:
            raise UserError(
                f"{location.given}: {missing}, and {unreadable(location.root / name, 'parquet', error)}"
            ) from None
        starts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for start, stop in zip(starts[:-1], starts[1:]):
            episode, length = int(ids[start]), stop - start
            begins = dict.fromkeys(videos, (row + start) / fps)
            ends = dict.fromkeys(videos, (row + stop) / fps)
            span = (row + start, row + stop)
            if episode in listing.entries:
                raise UserError(f"{location.given}: {missing}, and the rows of episode {episode} are not together")
            listing.entries[episode] = EpisodeEntry(length, (), name, videos, begins, ends, span)
        row += len(ids)
    for name in videos.values():
        frames = frames_listed(location.root / name, location.given)
        if frames != row:
            raise UserError(
                f"{location.given}: {missing}, and {name} has {frames} frames for {row} rows; was the recording "
                "finalized?"
            )


def presence(
    location: Location, entries: Mapping[int, EpisodeEntry], keys: Sequence[str], any_chunk: bool
) -> dict[str, int]:
    """How many episodes have their table here, and their videos of all `keys`; by listings of the folders.

    `any_chunk`: also in the folder of another chunk, as v2 names its files.
    """
    files = {e.data_path for e in entries.values()} | {p for e in entries.values() for p in e.video_paths.values()}
    looked = [location.root / p for p in (min(files, default=""), max(files, default=""))]
    all_fetched = not any((p.is_file() or p.is_symlink()) and absence(p) for p in looked)  # else each is looked into
    here: dict[str, set[str]] = {}

    def is_here(relative: str) -> bool:
        folder, _, name = relative.rpartition("/")
        folder = glob.escape(folder)
        folder = ANY_CHUNK.sub("chunk-*", folder) if any_chunk else folder
        if folder not in here:
            folders = location.root.glob(folder) if folder else [location.root]
            here[folder] = {p.name for path in folders if path.is_dir() for p in path.iterdir()}
        return name in here[folder] and (all_fetched or not absence(location.root / relative))

    videos = [[e.video_paths[k] for k in keys if k in e.video_paths] for e in entries.values()]
    return {
        "tables": sum(is_here(e.data_path) for e in entries.values()),
        "videos": sum(all(map(is_here, v)) for v in videos),
        "both": sum(is_here(e.data_path) and all(map(is_here, v)) for e, v in zip(entries.values(), videos)),
    }
