"""A dataset that grows and changes, and the cache that follows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dvla.cache.vlm.spec import EncoderSpec
from dvla.stages.caching.build import BuildReport, build
from dvla.stages.caching.config import BuildConfig
from support.lerobot_samples import LENGTHS, rewrite, text_column, the_file, with_column

SHARD = 8


class Corner:
    """A dataset that changes, and the cache of it."""

    def __init__(self, folder: Path, whole: Path, vlm: Path, /, **encoder: Any) -> None:
        """`whole`: a recording of PNG images. `encoder`: settings of the `EncoderSpec`."""
        self.folder, self.whole, self.vlm = folder, whole, vlm
        self.encoder = {"resolution": 64, "dtype": "float32", **encoder}
        self.source, self.out = folder / "data", folder / "cache"

    def record(self, episodes: int, change: Callable[[Path], None] = lambda root: None) -> Corner:
        """The first `episodes` of the recording, then changed."""
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.whole, self.source)
        info = json.loads((self.source / "meta/info.json").read_text())
        (self.source / "meta/info.json").write_text(
            json.dumps(info | {"total_episodes": episodes, "total_frames": sum(LENGTHS[:episodes])})
        )
        for file in (the_file(self.source, "meta/episodes/*/*.parquet"), the_file(self.source, "data/*/*.parquet")):
            table = pq.read_table(file)
            pq.write_table(table.filter(pa.compute.less(table["episode_index"], episodes)), file)
        change(self.source)
        return self

    def config(
        self, mode: str = "new", out: Path | None = None, more: tuple[Path, ...] = (), **changes: Any
    ) -> BuildConfig:
        """`changes`: of the encoder's settings (resolution, tokens) and of the build's."""
        spec = EncoderSpec(
            str(self.vlm),
            **{**self.encoder, **{name: changes.pop(name) for name in ("resolution", "tokens") if name in changes}},
        )
        sources = (str(self.source), *map(str, more)) if mode == "new" or not more else tuple(map(str, more))
        settings = {
            "batch_size": 5,
            "shard_frames": SHARD,
            "device": "cpu",
            "mode": mode,
            "max_quarantine": "1",
            **changes,
        }
        return BuildConfig(sources, spec, out or self.out, **settings)

    def build(self, mode: str = "new", **settings: Any) -> BuildReport:
        return build(self.config(mode, **settings))


def tree(path: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def other_pictures(view: str, episode: int) -> Callable[[Path], None]:
    """Turns the episode's images of one view upside down."""

    def change(root: Path) -> None:
        def flip(table: Any) -> Any:
            from io import BytesIO

            from PIL import Image

            column, out = f"observation.images.{view}", []
            for number, entry in zip(table["episode_index"].to_pylist(), table[column].to_pylist()):
                if number == episode:
                    picture = BytesIO()
                    Image.fromarray(np.asarray(Image.open(BytesIO(entry["bytes"])))[::-1]).save(picture, "PNG")
                    entry = {**entry, "bytes": picture.getvalue()}
                out.append(entry)
            return with_column(table, column, out)

        rewrite(the_file(root, "data/*/*.parquet"), flip)

    return change


def other_instruction(root: Path) -> None:
    """Of episode 1 alone: "open the oven" in place of "open the drawer"."""
    file = root / "meta/tasks.parquet"
    table = pq.read_table(file)
    name = text_column(table)
    texts = [t.replace("drawer", "oven") for t in table[name].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(texts)), file)
    episodes = the_file(root, "meta/episodes/*/*.parquet")
    listed = pq.read_table(episodes)
    tasks = [[t.replace("drawer", "oven") for t in row] for row in listed["tasks"].to_pylist()]
    pq.write_table(listed.set_column(listed.column_names.index("tasks"), "tasks", pa.array(tasks)), episodes)
