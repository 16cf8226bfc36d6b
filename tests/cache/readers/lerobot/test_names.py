"""Names of dimensions in every form that writers use, and names that look like markup."""

import json

import pytest

from dvla.cache.readers.lerobot.documents import flat_names
from support.lerobot_written import change_info, info, write_v2


@pytest.mark.parametrize(
    ("names", "flat"),
    [
        (["x", "y", "z"], ["x", "y", "z"]),
        ([["x", "y"], ["z"]], ["x", "y", "z"]),
        ({"motors": ["x", "y", "z"]}, ["x", "y", "z"]),
        ({"axes": ["x", "y", "z"]}, ["x", "y", "z"]),
        ({"arm": ["x", "y"], "hand": ["z"]}, ["x", "y", "z"]),
        ({"left": ["x"], "right": ["x"]}, ["left.x", "right.x"]),
        ({"z": 2, "x": 0, "y": 1}, ["x", "y", "z"]),
        ([0, 1, 2], ["0", "1", "2"]),
        ("x", ["x"]),
        ([None, "x"], ["x"]),
        (None, []),
    ],
)
def test_forms_of_names(names, flat):
    assert list(flat_names(names)) == flat


def test_brackets_print_as_they_are(tmp_path, dvla):
    root = write_v2(tmp_path / "cups [old]", ("put the [red] cup on [/table]", "pick [b]"))
    features = info("v2.1")["features"]
    for key in ("action", "observation.state"):
        features[key] = {**features[key], "names": ["pos[0]", "[/z]", "grip[bold]", "[link=x]y"]}
    change_info(root, features=features)
    shown = " ".join(dvla("data", "show", str(root), "--episode", "0").out.split())
    for text in ("cups [old]", "'put the [red] cup on [/table]'", "'pick [b]'", "[/z]", "grip[bold]", "[link=x]y"):
        assert text in shown
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": "[/red]"}\n')
    failed = dvla("data", "check", str(root))
    assert failed.code == 1 and "'length' is '[/red]', expected a number" in " ".join(failed.out.split())
    (root / "meta/info.json").write_text(json.dumps({"codebase_version": "[/b]v9"}))
    refused = dvla("data", "show", str(root))
    assert refused.code == 2 and "version v[/b]v9 is not readable" in refused.err
