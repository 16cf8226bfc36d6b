"""A build that loses many episodes does not finish, says why first, and loses nothing: with --allow-quarantine it is
finished at once, with the bytes it would have had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.manifest import is_finished, read_fingerprint
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.caching.build import build
from dvla.stages.caching.quarantine import TooManyQuarantined, most_allowed, reasons
from dvla.stages.caching.upkeep.repair import repair
from support.cli_runner import Dvla
from support.corner import Corner, tree
from support.lerobot_samples import LENGTHS, rewrite, the_file, with_column
from support.vlm_samples import TINY


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture
def corner(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> Corner:
    """Three episodes, of which the second cannot be decoded: its rows and headers are intact."""
    return Corner(tmp_path, recorded["image"], vlm).record(3, damage(1))


def damage(*episodes: int) -> Callable[[Path], None]:
    def cut(table: Any) -> Any:
        numbers, images = table["episode_index"].to_pylist(), table["observation.images.front"].to_pylist()
        damaged = [{**i, "bytes": i["bytes"][:60]} if n in episodes else i for n, i in zip(numbers, images)]
        return with_column(table, "observation.images.front", damaged)

    return lambda root: rewrite(the_file(root, "data/*/*.parquet"), cut)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_does_not_finish_and_nothing_is_encoded_again(corner: Corner, workers: int) -> None:
    from dvla.stages.caching.config import WorkerSpec

    spec = WorkerSpec(workers)
    with pytest.raises(TooManyQuarantined, match=r"^1 of 3 episodes \(33.3 %\) cannot be used: ") as error:
        corner.build(max_quarantine="20%", workers=spec)
    assert "is not finished (--max-quarantine 20%). Rerun with --allow-quarantine" in str(error.value)
    assert len(error.value.reasons) == 1 and error.value.reasons[0].startswith("  1 × data episode 1: ")
    assert not is_finished(corner.out)
    report = corner.build(max_quarantine="20%", allow_quarantine=True)
    assert (report.timing.images, report.quarantined, report.resumed_shards) == (0, 1, len(list_shards(corner.out)))
    corner.build(out=corner.folder / "other", max_quarantine="34%")
    assert tree(corner.out) == tree(corner.folder / "other")  # neither option is part of it
    assert corner.build(max_quarantine="0%").complete_before  # what is finished stays so


def list_shards(out: Path) -> list[Path]:
    return [p for p in out.glob(".commits/*/*/*.json")]


def test_from_the_command_line(corner: Corner, vlm: Path, dvla: Dvla) -> None:
    where = ["--vlm", "tiny_qwen3vl", "--vlm-path", vlm, "--device", "cpu", "--out", corner.out]
    done = dvla("cache", "build", corner.source, *where)
    assert done.code == 1 and done.err.startswith("1 of 3 episodes (33.3 %)") and "next:" not in done.out, done
    assert "  1 × data episode 1: " in done.err and "Traceback" not in done.err
    repaired = dvla("cache", "repair", corner.out, "--device", "cpu")
    assert repaired.code == 1 and repaired.err.startswith("1 of 3 episodes"), repaired
    assert not is_finished(corner.out)
    done = dvla("cache", "build", corner.source, *where, "--allow-quarantine")
    assert done.code == 0 and "already complete" in done.out and "next: dvla train" in done.out, done
    assert dvla("cache", "repair", corner.out, "--device", "cpu").code == 0


def test_a_repair_keeps_what_was_finished_and_finishes_when_allowed(corner: Corner) -> None:
    with pytest.raises(TooManyQuarantined):
        corner.build(max_quarantine="0%")
    report = repair(corner.out, device="cpu", say=lambda _: None, allow_quarantine=True)
    assert report.shards == 0 and is_finished(corner.out)
    before = tree(corner.out)
    (corner.out / "data" / "features" / "wrist" / "c" / "0" / "0" / "0").unlink()
    assert repair(corner.out, device="cpu", say=lambda _: None).shards == 1
    assert tree(corner.out) == before


def test_an_update_or_append_that_loses_too_many_leaves_the_finished_cache(corner: Corner) -> None:
    corner.record(2).build(max_quarantine="0%")
    before, fingerprint = tree(corner.out), read_fingerprint(corner.out)
    corner.record(3, damage(2))
    for mode in ("append", "update"):
        with pytest.raises(TooManyQuarantined, match="1 of 3 episodes"):
            corner.build(mode, max_quarantine="20%")
        assert tree(corner.out) == before and Cache.open(corner.out).fingerprint == fingerprint
    report = corner.build("append", allow_quarantine=True)
    assert report.timing.images == 0 and report.previous is not None and report.quarantined == 1
    corner.record(3)
    assert corner.build("update", max_quarantine="0%").quarantined == 0  # mended


def test_what_the_tables_tell_is_said_before_anything_is_encoded(corner: Corner) -> None:
    def nan(table: Any) -> Any:
        actions = table["action"].to_pylist()
        actions[LENGTHS[0] + 1][0] = float("nan")
        return with_column(table, "action", actions)

    corner.record(3, lambda root: rewrite(the_file(root, "data/*/*.parquet"), nan))
    said: list[str] = []
    with pytest.raises(TooManyQuarantined):
        build(corner.config(max_quarantine="0"), say=said.append)
    assert ["load" in line for line in said] == [True, True, False, False]
    assert said[2].startswith("this build will not finish without --allow-quarantine") and "'action' is nan" in said[3]
    said.clear()
    build(corner.config(allow_quarantine=True), say=said.append)
    assert len(said) == 2


def test_all_of_them(corner: Corner) -> None:
    corner.record(3, damage(0, 1, 2))
    with pytest.raises(TooManyQuarantined, match="^no episode of data could be read: .* is not finished"):
        corner.build(max_quarantine="99%")
    assert corner.build(max_quarantine="100%").lost == ("data",)


@pytest.mark.parametrize(
    ("limit", "allowed"), [("20%", 20), ("0", 0), ("12", 12), (" 0.5 % ", 0.5), ("100%", 100), ("0%", 0)]
)
def test_limits(limit: str, allowed: float) -> None:
    assert most_allowed(limit, 100) == allowed


@pytest.mark.parametrize("limit", ["", "%", "-1", "101%", "0.2", "five", "nan", "inf%", "1e3", "1_000", "5%%", "٣"])
def test_no_limit_is_one_line(corner: Corner, limit: str) -> None:
    with pytest.raises(UserError, match=r"--max-quarantine .*: give a share of the episodes, 0% to 100%, or") as error:
        build(dataclasses.replace(corner.config(), max_quarantine=limit))
    assert "\n" not in str(error.value)


def test_reasons_that_differ_in_numbers_are_one() -> None:
    found = {"a": {(n, f"a episode {n}: frame {n * 7} is damaged") for n in range(4)}, "b": {(0, "b episode 0: gone")}}
    assert reasons(found) == ["  4 × a episode 0: frame 0 is damaged", "  1 × b episode 0: gone"]
    many = {"a": {(n, f"a: {chr(97 + n)}") for n in range(5)}}
    assert reasons(many)[3:] == ["  and 2 other reasons"]
