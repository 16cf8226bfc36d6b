"""The grammar by which demonstrations are chosen, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla.cache.actions.selection import Choice, Selection, as_text, parse
from dvla.errors import UserError

LISTED = [0, 1, 2, 3, 5, 8, 10]


def chosen(*include: str, exclude: tuple[str, ...] = (), names: tuple[str, ...] = ("push",)) -> list[int]:
    return Selection(include, exclude).by_dataset(names)[names[0]].episodes(LISTED, names[0])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("1",), [1]),
        (("0-2,8",), [0, 1, 2, 8]),
        (("5-",), [5, 8, 10]),
        (("2 - 5 , 10",), [2, 3, 5, 10]),  # 4 is no episode: a gap in a range is none
        (("8", "0"), [0, 8]),
        (("push=3-",), [3, 5, 8, 10]),
        (("[0, 2, 5]",), [0, 2, 5]),
        (('[0, "2-3"]',), [0, 2, 3]),
    ],
)
def test_ids_and_ranges(given: tuple[str, ...], wanted: list[int]) -> None:
    assert chosen(*given) == wanted
    assert chosen(exclude=given) == [e for e in LISTED if e not in wanted]


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ([0, "2-3", 8], [0, 2, 3, 8]),
        ({"push": [1, "8-"]}, [1, 8, 10]),
        ({"push": [1], "other": [0]}, [1]),
        ({"3": [[0, 5]], "8": [], "10": [[2, 3], [4, 9]]}, [3, 10]),  # an episode without frames is left out
        ({"push": {"05": [[0, 5]]}}, [5]),
    ],
)
def test_a_json_file(tmp_path: Path, document: object, wanted: list[int]) -> None:
    file = tmp_path / "keep.json"
    file.write_text("\ufeff" + json.dumps(document))
    names = ("push", "other") if "other" in str(document) else ("push",)
    choice = Selection((str(file),)).by_dataset(names)["push"].numbered(LISTED, "push", None)
    assert choice.episodes(LISTED, "push") == wanted
    again = Choice.from_document(json.loads(json.dumps(choice.document())))
    assert again == choice and again.document() == choice.document()
    (tmp_path / "a=b").mkdir()
    odd = file.rename(tmp_path / "a=b" / "keep.json")  # "=" in a path is not that of NAME=
    assert Selection((str(odd),)).pinned().by_dataset(names)["push"].numbered(LISTED, "push", None) == choice
    odd.rename(file)
    pinned = Selection((f"push={file}",) if isinstance(document, list) else (str(file),)).pinned()
    assert pinned == pinned.pinned() and pinned.by_dataset(names)["push"].numbered(LISTED, "push", None) == choice
    file.write_text(json.dumps([0]))
    with pytest.raises(UserError, match="it has changed since the run began"):
        pinned.by_dataset(names)


def test_recordings_are_found_by_their_key() -> None:
    """openpi's filter of DROID names recordings, and lists more of them than a part of the dataset has."""
    keys = {0: "r2d2/a--b.h5", 3: "r2d2/c--d.h5"}
    given = Choice(frames={"r2d2/c--d.h5": ((0, 4),), "r2d2/x--y.h5": ((1, 2),)})
    assert given.numbered(LISTED, "droid", keys.get).frames == {"3": ((0, 4),)}
    with pytest.raises(UserError, match="no episode of droid is among those of the file"):
        given.numbered(LISTED, "droid", lambda number: None)
    with pytest.raises(UserError, match="give it to `dvla cache build`"):
        given.numbered(LISTED, "droid", None)


@pytest.mark.parametrize(
    ("text", "short"), [("7,0-3,2,4", "0-4,7"), ("3-,1,9", "1,3-"), ("5", "5"), ("0-1,3-4", "0-1,3-4")]
)
def test_a_selection_is_stored_in_one_form(text: str, short: str) -> None:
    assert as_text(parse(text, "--x")) == short and as_text(parse(short, "--x")) == short


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("9-3", "", "the range 9-3 is reversed; write 3-9"),
        ("-3", "", "'-3' is no id and no range; give ids and ranges such as 0-9,17,30-"),
        ("1.5", "", "'1.5' is no id"),
        ("1,,2", "", "'' is no id"),
        ("one", "", "'one' is no id"),
        ("٣", "", "is no id"),
        ("9" * 40, "", "is no id"),
        ("99", "", "push has no episode 99; it has 7, 0 to 10"),
        ("4", "", "push has no episode 4"),
        ("6-7", "", "push has no episode 6"),
        ("5-99", "", "push has no episode 99"),
        ("11-", "", "push has no episode 11"),
        ("", "99", "--exclude-episodes: push has no episode 99"),
        ("0-3", "2", "both name episode 2 of push"),
        ("", "0-", "no episode of push is left"),
        ("grab=0-3", "", "unknown dataset in --include-episodes 'grab'"),
        ("push=", "", "'' is no id"),
        ("[1, 2", "", "this is not JSON"),
        ("[" * 100_000, "", "this is not JSON"),
        ("[" * 900 + "]" * 900, "", "nested over 64 levels"),
        ("[true]", "", "true is no id and no range"),
        ("[[0, 3]]", "", 'write 5, or "5-9"'),
        ("[]", "", "an empty list leaves nothing"),
        ("gone.json", "", "cannot read"),
    ],
)
def test_what_is_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(*[include] * bool(include), exclude=(exclude,) if exclude else ())
    assert message in str(error.value) and len(str(error.value)) < 220 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "expected a list of ids and ranges, or an object"),
        (3, "expected a list"),
        ({"grab": [0]}, "unknown dataset 'grab'"),
        ({"push": [[0, 3]]}, 'write 5, or "5-9"'),
        ({"push": 3}, "expected a list of ids and ranges, got 3"),
        ({"0": [[5, 5]]}, "frames [5, 5] of episode '0' are no range"),
        ({"0": [[-1, 5]]}, "are no range"),
        ({"push": {"0": [3]}}, "frames 3 of episode '0'"),
        ({"77": [[0, 5]]}, "push has no episode 77"),
    ],
)
def test_what_is_refused_of_a_file(tmp_path: Path, document: object, message: str) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as error:
        chosen(str(file))
    assert message in str(error.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="this is not JSON"):
        chosen(str(file))


def test_several_datasets_are_named() -> None:
    names = ("push", "grab")
    with pytest.raises(UserError, match="there are 2 datasets; say of which, e.g. push=0-3"):
        chosen("0-3", names=names)
    both = Selection(("push=0-1", "grab=2"), ("push=5",)).by_dataset(names)
    assert both["push"].include == ((0, 1),) and both["grab"].include == ((2, 2),) and both["grab"].exclude == ()


def test_frames_beyond_the_end_of_an_episode_are_refused() -> None:
    choice = Choice(frames={"3": ((0, 10), (20, 31))})
    choice.require_frames(3, 31, "push")
    with pytest.raises(UserError, match=r"frames \[20, 31\) of episode 3 of push, which has 30 frames"):
        choice.require_frames(3, 30, "push")
