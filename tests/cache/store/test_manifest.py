"""The documents of a cache folder: one reader, one message for each way in which a folder is not a cache."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.manifest import (
    FINGERPRINT,
    MANIFEST,
    find_manifest,
    manifest_document,
    plan_of,
    read_commit,
    read_fingerprint,
    read_manifest,
    shard_commit,
)
from dvla.errors import UserError
from support import synthetic_cache as synthetic
from support.package_source import name_of, package_files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "cache"
    synthetic.build(path)
    return path


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(file.read_bytes())
    change(document)
    file.write_text(json.dumps(document))


def test_no_other_file_opens_them_by_name() -> None:
    """String literals, docstrings aside."""
    names = re.compile(r"(^|/)(fingerprint\.json|manifest\.json|\.commits)($|/)")
    found = []
    for file in package_files():
        tree = ast.parse(file.read_text())
        found += [
            f"{name_of(file)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and names.search(node.value)
        ]
    assert {line.split(":")[0] for line in found} == {"cache/store/manifest.py"}, found


def test_what_is_written_is_read(cache: Path) -> None:
    plan = synthetic.make_plan()
    manifest = read_manifest(cache)
    assert plan_of(read_fingerprint(cache), cache) == plan and manifest == Cache.open(cache).manifest == find_manifest(
        cache
    )
    quarantined = {d["name"]: d["quarantined"] for d in manifest["datasets"]}
    assert manifest_document(plan, read_fingerprint(cache), manifest["files"], quarantined) == manifest
    assert all(name in manifest["files"] for t in plan.tasks() for name in read_commit(shard_commit(cache, t))["files"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (FINGERPRINT, b"{", "fingerprint.json is not valid JSON"),
        (FINGERPRINT, b"[]", "fingerprint.json is damaged: it is [], expected a valid mapping"),
        (FINGERPRINT, b"{}", "fingerprint.json is damaged: 'store' is missing"),
        (FINGERPRINT, b'{"store": {"format": 2}}', "fingerprint.json is damaged: 'store.tokens' is missing"),
        (FINGERPRINT, b'{"store": {"format": 1}}', "has format 1, this version reads 2 and 3; rebuild it"),
        (MANIFEST, b"{", "manifest.json is not valid JSON"),
        (
            MANIFEST,
            b'{"format": 2, "complete": false, "files": {}}',
            "manifest.json is damaged: 'complete' is False, expected True (and ",
        ),
        (MANIFEST, b'{"format": 4}', "has format 4, this version reads 2 and 3; rebuild it"),
        (MANIFEST, None, "is incomplete (8 shards are finished); rerun the same `dvla cache build`"),
        (FINGERPRINT, None, "is not a dvla cache (it has no fingerprint.json)"),
    ],
)
def test_a_folder_that_is_no_readable_cache_is_refused(
    cache: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is None:
        (cache / name).unlink()
        message = message.replace("8", str(len(synthetic.make_plan().tasks())))
    else:
        (cache / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        plan_of(read_fingerprint(cache), cache) if name == FINGERPRINT else read_manifest(cache)
    assert str(cache) in str(error.value) and "\n" not in str(error.value)
    assert name != MANIFEST or find_manifest(cache) is None


def test_a_damaged_commit_record_names_the_command_that_repairs_it(cache: Path) -> None:
    record = shard_commit(cache, synthetic.make_plan().tasks()[0])
    edit(record, lambda document: document["files"].update(x={"bytes": 1}))
    with pytest.raises(UserError, match="is damaged: 'files.x.crc32c' is missing; run `dvla cache repair`"):
        read_commit(record)
