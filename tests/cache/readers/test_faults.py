"""Any error of one episode costs that episode, whatever its type; the machine's errors end the command."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers import open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode, View
from dvla.cache.readers.faults import whole_dataset
from dvla.cache.readers.tables import EpisodeTable, Rows
from dvla.errors import Failed, UserError
from support.memory_source import MemorySource

ERRORS = {
    "unreadable-file": (
        OverflowError("too large"),
        ValueError("bad\nsecond line"),
        KeyError("length"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        OSError(errno.EIO, "Input/output error"),
        EOFError(),
        ZeroDivisionError("division by zero"),
    ),
    "unexpected-error": (TypeError("NoneType"), AttributeError("x"), AssertionError()),
}
CASES = [(kind, error) for kind, errors in ERRORS.items() for error in errors]


class Odd(MemorySource):
    """Three episodes; reading the middle one's rows, images or single frames calls `fail`."""

    def __init__(self, at: str, fail: Callable[[], object]) -> None:
        config = DatasetConfig("odd", (), "gripper_eef", (FieldSpec("gripper_open"),), ())
        super().__init__(config, {e: {"action": np.full((5, 1), e / 10)} for e in range(3)})
        self.at, self.fail = at, fail

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        if self.at == "rows" and episode_id == 1:
            self.fail()
        return super()._rows(episode_id, columns, where)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        if self.at == "views" and episode_id == 1:
            self.fail()
        length = len(table.action)

        def frames(start: int, stop: int) -> Iterator[np.ndarray]:
            for index in range(start, stop):
                if self.at == "frames" and (episode_id, index) == (1, 3):
                    self.fail()
                    return
                yield np.zeros((4 + (self.at == "size" and index == 2), 4, 3), np.uint8)

        return [View("front", 4, 4, length, frames, "0" * 64)]


def raising(error: Exception) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


def read(source: Odd) -> list[object]:
    """Of each episode: how many images it has, or why not."""
    return [source.attempt(lambda n: len(list(source.load(n).views[0].frames())), e) for e in source.episode_ids]


@pytest.mark.parametrize("at", ["rows", "views", "frames"])
@pytest.mark.parametrize(("kind", "error"), CASES, ids=[type(e).__name__ for _, e in CASES])
def test_an_error_costs_one_episode(at: str, kind: str, error: Exception) -> None:
    first, lost, last = read(Odd(at, raising(error)))
    assert (first, last) == (5, 5)
    assert isinstance(lost, Failed) and lost.kind == kind and lost.episode == 1
    assert lost.reason.startswith({"frames": "view 'front', frame 3: "}.get(at, ""))
    assert type(error).__name__ in lost.reason and "\n" not in lost.reason
    assert ("please report" in lost.reason) == (kind == "unexpected-error")


def test_the_reason_names_the_place_in_the_package() -> None:
    source = Odd("rows", lambda: None)
    source._rows = lambda *_: Rows({"action": np.zeros((3, 1))}, "", ["soon"])  # type: ignore[arg-type, method-assign]
    lost = source.attempt(source.load, 0)
    assert (
        isinstance(lost, Failed) and "ValueError: could not" in lost.reason and "(cache/readers/base.py:" in lost.reason
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timestamps": np.array([0.0, np.nan, 1.0])}, "timestamps do not increase at frame 1"),
        ({"timestamps": np.array([0.0, 1.0, np.inf])}, "timestamps do not increase at frame 2"),
        ({"instruction": "pick \udcff\nthis"}, "not Unicode text: pick \N{REPLACEMENT CHARACTER} this"),
    ],
)
def test_values_that_no_cache_can_hold(change: dict[str, Any], reason: str) -> None:
    source = Odd("rows", lambda: None)
    rows = Rows(**{"columns": {"action": np.zeros((3, 1))}, "instruction": "", **change})
    source._rows = lambda *_: rows  # type: ignore[method-assign]
    lost = source.attempt(source.table, 0)
    assert isinstance(lost, Failed) and reason in lost.reason


def test_tables_go_on_past_an_odd_episode() -> None:
    (block,) = Odd("rows", raising(OverflowError("too large"))).tables()
    assert np.unique(block.episode_ids).tolist() == [0, 2] and [f.episode for f in block.refused] == [1]


def test_missing_and_misshapen_frames_are_refused() -> None:
    for at, reason in (("frames", "frame 3 is missing"), ("size", "frame 2 is [5, 4, 3], expected [4, 4, 3]")):
        lost = read(Odd(at, lambda: None))[1]
        assert isinstance(lost, Failed) and reason in lost.reason


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.ESTALE])
def test_the_machine_s_error_ends_the_command(number: int) -> None:
    def fail() -> None:
        try:
            raise OSError(number, "of the machine")
        except OSError as error:  # as a reader that takes it for the file's
            raise CorruptEpisode(f"odd episode 1: cannot be read ({error})") from None

    with pytest.raises(UserError, match="of the machine.*rerun"):
        read(Odd("rows", fail))


def test_a_root_that_is_gone_ends_the_command(tmp_path: Path) -> None:
    """A folder that is empty now, too: the place where something was mounted."""
    for root in (tmp_path / "away", tmp_path):
        source = Odd("rows", raising(FileNotFoundError("gone")))
        source.path = root
        with pytest.raises(UserError, match="no longer there; rerun"):
            read(source)


def test_debug_raises_what_was_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVLA_DEBUG", "1")
    with pytest.raises(TypeError):
        read(Odd("rows", raising(TypeError("ours"))))
    with pytest.raises(TypeError), whole_dataset("here"):
        raise TypeError("ours")


def test_an_error_about_the_dataset_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    monkeypatch.setattr("dvla.cache.readers.lerobot.source.Metadata", raising_of(RecursionError("too deep\nby far")))
    with pytest.raises(UserError) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value) and "RecursionError: too deep" in str(caught.value)
    assert "by far" not in str(caught.value)


def raising_of(error: Exception) -> Callable[..., object]:
    return lambda *_: raising(error)()


def test_a_message_is_short_whatever_it_quotes() -> None:
    assert len(str(UserError("x " * 35000))) == len(str(CorruptEpisode("x " * 35000))) + 1 == 1001
