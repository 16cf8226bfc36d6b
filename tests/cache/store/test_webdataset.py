"""Export to WebDataset tars and back without loss; other tools read it, damage is found, interruptions cost nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dvla.cache.store.cache import Cache
from dvla.cache.store.checksums import verify_checksums
from dvla.cache.store.manifest import read_fingerprint
from dvla.cache.store.plan import BuildPlan, DatasetPlan
from dvla.cache.store.webdataset import tars as webdataset_io
from dvla.cache.store.webdataset.cache import WebDatasetCache
from dvla.cache.store.webdataset.tars import labels
from dvla.cache.store.writer import CacheWriter
from dvla.cli import run
from dvla.common.files import crc32c
from dvla.errors import UserError
from dvla.stages.caching.transfer import webdataset as exchange
from dvla.stages.caching.transfer.webdataset import export, import_cache
from support import synthetic_cache as synthetic

SHARD = 150_000  # bytes: several tars per dataset


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """No waiting for the disk: what these tests show does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def tree(path: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache` (int8, zstd, stride 2, a variant, a quarantined episode) and its export `tars`."""
    base = tmp_path_factory.mktemp("exchange")
    synthetic.build(base / "cache", plan=synthetic.make_plan(**synthetic.SETTINGS["int8-zstd-stride2-variant"]))
    export(base / "cache", str(base / "tars"), shard_nbytes=SHARD)
    return base


@pytest.fixture
def tars(base: Path, tmp_path: Path) -> Path:
    """A copy of the export to damage."""
    (tmp_path / "tars").mkdir()
    for name, data in tree(base / "tars").items():
        (tmp_path / "tars" / name).write_bytes(data)
    return tmp_path / "tars"


# --- content ---


@pytest.mark.parametrize("setting", synthetic.SETTINGS)
def test_there_and_back_byte_for_byte(tmp_path: Path, setting: str) -> None:
    synthetic.build(tmp_path / "cache", plan=synthetic.make_plan(**synthetic.SETTINGS[setting]))
    exported = export(tmp_path / "cache", str(tmp_path / "tars"), shard_nbytes=SHARD)
    assert exported.found == 0 and exported.bytes == sum(
        len(v) for n, v in tree(tmp_path / "tars").items() if n.endswith(".tar")
    )
    report = import_cache(str(tmp_path / "tars"), tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")
    assert report.rewritten == 0 and report.samples == exported.samples


def test_tars_of_any_size_hold_the_same_cache(base: Path, tmp_path: Path) -> None:
    export(base / "cache", str(tmp_path / "large"))  # one tar of each kind
    assert sorted(tree(tmp_path / "large")) == [
        "_meta.tar",
        "_quarantine-alpha-000000.tar",
        "alpha-000000.tar",
        "beta-000000.tar",
        "index.json",
    ]
    export(base / "cache", str(tmp_path / "small"), shard_nbytes=1)  # one observation in each
    assert len(tree(tmp_path / "small")) == 2 + sum(d.observations for d in Cache.open(base / "cache").datasets)
    for name in ("large", "small"):
        import_cache(str(tmp_path / name), tmp_path / f"{name}-back")
        assert tree(tmp_path / f"{name}-back") == tree(base / "cache")
    export(tmp_path / "small-back", str(tmp_path / "again"), shard_nbytes=SHARD)
    assert tree(tmp_path / "again") == tree(base / "tars")


def test_plain_webdataset_reads_it(base: Path) -> None:
    import webdataset

    cache, index = Cache.open(base / "cache"), json.loads((base / "tars/index.json").read_text())
    entries = index["shardlist"]
    assert len(entries) > 5
    urls = [str(base / "tars" / e["url"]) for e in entries]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    keys = [s["__key__"] for s in samples]
    assert keys == sorted(keys) and len(keys) == sum(e["nsamples"] for e in entries)
    usable = {d.name: int(d.episode_observations[~d.quarantined].sum()) for d in cache.datasets}
    assert {name: sum(k.startswith(f"{name}/") for k in keys) for name in usable} == usable
    for s in samples:
        about = s["json"]
        d = cache.named(about["dataset"])
        row, episode = about["row"], int(d.episode_of(np.array([about["row"]]))[0])
        assert about["episode_id"] == d.episode_id[episode] and about["step"] == row - d.episode_start[episode]
        assert about["instruction"] == d.instructions[d.episode_instruction[episode]] and not about["quarantined"]
        assert (about["control_hz"], about["embodiment"], about["dtype"]) == (d.control_hz, d.embodiment_id, "int8")
        np.testing.assert_array_equal(s["action.npy"], d.action[row])
        np.testing.assert_array_equal(s["proprio.npy"], d.proprio[row])
        for view in d.views:
            for variant, name in enumerate((view, f"{view}.aug1")):
                codes, scale = d.records(view, np.array([row]), variant)
                assert s[f"features.{name}.npy"].dtype == np.int8
                np.testing.assert_array_equal(s[f"features.{name}.npy"], codes[0])
                np.testing.assert_array_equal(s[f"scales.{name}.npy"], scale[0])
    meta = {s["__key__"]: s for s in webdataset.WebDataset(str(base / "tars/_meta.tar"), shardshuffle=False).decode()}
    assert meta.keys() == {"cache/store", "alpha/tables", "beta/tables"}
    np.testing.assert_array_equal(meta["cache/store"]["channel_scale.npy"], synthetic.CHANNELS)
    np.testing.assert_array_equal(meta["alpha/tables"]["action.npy"], cache.named("alpha").action)
    lost = list(
        webdataset.WebDataset(
            [str(base / "tars" / e["url"]) for e in index["dvla"]["quarantine"]], shardshuffle=False
        ).decode()
    )
    assert {s["json"]["episode_id"] for s in lost} == {13} and all(s["json"]["quarantined"] for s in lost)


def test_tars_are_reproducible_and_bounded(base: Path) -> None:
    index = json.loads((base / "tars/index.json").read_text())
    for entry in [index["dvla"]["meta"], *index["shardlist"], *index["dvla"]["quarantine"]]:
        data = (base / "tars" / entry["url"]).read_bytes()
        assert (len(data), crc32c(data)) == (entry["filesize"], entry["crc32c"])
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        assert entry["url"] == "_meta.tar" or len(data) <= SHARD + 10240  # the end of a tar is padded to 10 KiB


def test_views_that_webdataset_would_confuse() -> None:
    assert labels(("Front", "wrist.left")) == {"Front": "front", "wrist.left": "wrist.left"}
    assert labels(("Front", "front")) == {"Front": "view0", "front": "view1"}
    assert labels(("a", "A.AUG1")) == {"a": "view0", "A.AUG1": "view1"}


def test_long_and_awkward_names_survive(tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    alpha, name = plan.datasets[0], "Lab.v2_" + "x" * 110  # dots in a key's folder, longer than a tar header's field
    episodes = tuple(e for e in alpha.episodes[:3])
    plan = BuildPlan((DatasetPlan(name, ("Front.RGB", "front.rgb"), episodes),), plan.tokens, plan.width, 16)
    with CacheWriter.create_or_resume(tmp_path / "cache", synthetic.FINGERPRINT, plan) as writer:
        for task in writer.missing():
            writer.write_shard(task, synthetic.produce(plan, task))
        writer.write_tables(name, synthetic.make_tables(plan, name))
        writer.finish()
    export(tmp_path / "cache", str(tmp_path / "tars"))
    import_cache(str(tmp_path / "tars"), tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")
    import webdataset

    sample = next(
        iter(webdataset.WebDataset(str(tmp_path / "tars" / f"{name}-000000.tar"), shardshuffle=False).decode())
    )
    assert sample["__key__"].startswith(f"{name}/")
    np.testing.assert_array_equal(sample["features.view1.npy"], synthetic.feature(name, "front.rgb", 0))


# --- places ---


def test_urls_and_pipes(base: Path, tmp_path: Path) -> None:
    expected, cache = tree(base / "tars"), tree(base / "cache")
    export(base / "cache", f"file://{tmp_path}/file", shard_nbytes=SHARD)
    assert tree(tmp_path / "file") == expected
    import_cache(f"file://{tmp_path}/file", tmp_path / "a")
    (tmp_path / "pipe").mkdir()
    export(base / "cache", f"pipe:cat > {tmp_path}/pipe/{{name}}", shard_nbytes=SHARD)
    assert tree(tmp_path / "pipe") == expected
    import_cache(f"pipe:cat {tmp_path}/pipe/{{name}}", tmp_path / "b")
    fs, url = fsspec.filesystem("memory"), "memory://exchange/cache"
    report = export(base / "cache", url, shard_nbytes=SHARD)
    assert {p.rsplit("/", 1)[1]: fs.cat(p) for p in fs.ls("/exchange/cache", detail=False)} == expected
    assert export(base / "cache", url, shard_nbytes=SHARD).found == report.parts
    import_cache(url, tmp_path / "c")
    for name in "abc":
        assert tree(tmp_path / name) == cache
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "file", "pipe"]  # no copies are left
    fs.pipe_file("/exchange/cache/beta-000000.tar", fs.cat("/exchange/cache/beta-000000.tar")[:-512])
    with pytest.raises(UserError, match="memory://exchange/cache/beta-000000.tar is damaged"):
        import_cache(url, tmp_path / "d")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nosuch://x/y", "nosuch"),
        ("pipe:cat > x", "has no {name}"),
        ("pipe:cat > /nowhere/at/all/{name}", "exit code|cannot write"),
        ("pipe:exit 3 # {name}", "exit code 3|cannot write"),
        ("{file}", "cannot write to"),
        ("{file}/below", "cannot write to"),
    ],
)
def test_places_that_do_not_work(base: Path, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=message) as error:
        export(base / "cache", out.replace("{file}", str(tmp_path / "file")))
    assert "\n" not in str(error.value)


def test_foreign_folders_are_refused(base: Path, tmp_path: Path, tars: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="photo.jpg"):
        export(base / "cache", str(tmp_path / "mine"))
    with pytest.raises(UserError, match="holds other files"):
        export(base / "cache", str(base / "cache"))
    with pytest.raises(UserError, match="another --shard-size"):
        export(base / "cache", str(tars))
    synthetic.build(tmp_path / "other")
    with pytest.raises(UserError, match="of another cache"):
        export(tmp_path / "other", str(tars), shard_nbytes=SHARD)
    with pytest.raises(UserError, match="did you mean|allowed"):
        export(base / "cache", str(tmp_path / "x"), format="webdatset")
    with pytest.raises(UserError, match="is a WebDataset export; .*dvla cache import"):
        read_fingerprint(tars)
    with pytest.raises(UserError, match="holds other files"):
        import_cache(str(tars), tmp_path / "mine")
    with pytest.raises(UserError, match="built from other settings"):
        import_cache(str(tars), tmp_path / "other")
    assert tree(tars) == tree(base / "tars") and os.listdir(tmp_path / "mine") == ["photo.jpg"]


# --- interruptions ---


class Stop(BaseException):
    pass


def test_interrupted_export_keeps_what_is_finished(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write, left = tmp_path / "tars", exchange.write_tar, 3

    def limited(place, name, samples):
        nonlocal left
        left -= 1
        return write(place, name, samples if left else broken(samples))

    def broken(samples):
        yield next(samples)
        raise Stop

    monkeypatch.setattr(exchange, "write_tar", limited)
    with pytest.raises(Stop):
        export(base / "cache", str(out), shard_nbytes=SHARD)
    assert not list(out.glob(".*.tmp-*")) and not (out / "index.json").exists()
    with pytest.raises(UserError, match="no export at"):
        import_cache(str(out), tmp_path / "back")
    with pytest.raises(UserError, match="another --shard-size"):
        export(base / "cache", str(out))
    (out / ".beta-000000.tar.tmp-killed").write_bytes(b"half")
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    monkeypatch.setattr(exchange, "write_tar", write)
    assert len(before) == 2 and export(base / "cache", str(out), shard_nbytes=SHARD).found == 2
    assert tree(out) == tree(base / "tars") and {n: (out / n).stat().st_mtime_ns for n in before} == before
    (out / "alpha-000001.tar").unlink()  # lost afterwards: that one alone is written again
    report = export(base / "cache", str(out), shard_nbytes=SHARD)
    assert report.found == report.parts - 1 and tree(out) == tree(base / "tars")


@pytest.mark.parametrize("shards", [0, 1, 7])
def test_interrupted_import_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    write, left = CacheWriter.write_shard, shards

    def limited(self, task, chunks, quarantined=()):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        write(self, task, chunks, quarantined)

    monkeypatch.setattr(CacheWriter, "write_shard", limited)
    with pytest.raises(Stop):
        import_cache(str(base / "tars"), tmp_path / "back")
    with pytest.raises(UserError, match="incomplete"):
        Cache.open(tmp_path / "back")
    monkeypatch.setattr(CacheWriter, "write_shard", write)
    assert import_cache(str(base / "tars"), tmp_path / "back").found == shards
    assert tree(tmp_path / "back") == tree(base / "cache")
    report = import_cache(str(base / "tars"), tmp_path / "back")  # finished: nothing to do
    assert report.found == report.parts


def test_two_exports_at_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exchange.write_tar

    def second(*arguments):
        with pytest.raises(UserError, match="another process is writing"):
            export(base / "cache", str(tmp_path / "tars"), shard_nbytes=SHARD)
        return write(*arguments)

    monkeypatch.setattr(exchange, "write_tar", second)
    export(base / "cache", str(tmp_path / "tars"), shard_nbytes=SHARD)
    assert tree(tmp_path / "tars") == tree(base / "tars")


# --- damage ---


@pytest.mark.parametrize("name", ["_meta.tar", "alpha-000001.tar", "beta-000000.tar", "_quarantine-alpha-000000.tar"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_damaged_tars_are_named(tars: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = tars / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "missing": path.unlink,
        "cut": lambda: os.truncate(path, 20480),
        "flipped": lambda: path.write_bytes(data),
        "empty": lambda: os.truncate(path, 0),
    }[damage]()
    said = {"missing": ": No such file", "flipped": " is damaged .crc32c"}.get(
        damage, " is damaged .[0-9]+ bytes, [0-9]+ were written"
    )
    with pytest.raises(UserError, match=name + said) as error:
        import_cache(str(tars), tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back/manifest.json").exists()


def test_repaired_export_finishes_the_import(base: Path, tars: Path, tmp_path: Path) -> None:
    good = (tars / "beta-000000.tar").read_bytes()
    (tars / "beta-000000.tar").write_bytes(good[:-700])
    with pytest.raises(UserError, match="beta-000000.tar"):
        import_cache(str(tars), tmp_path / "back")
    (tars / "beta-000000.tar").write_bytes(good)
    assert import_cache(str(tars), tmp_path / "back").found > 0
    assert tree(tmp_path / "back") == tree(base / "cache")


def forge(tars: Path, name: str, change) -> None:
    """Rewrite one tar by `change(member name, data) → data`, and its line in the index with it."""
    out = io.BytesIO()
    with tarfile.open(tars / name) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            data = change(member.name, old.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    (tars / name).write_bytes(out.getvalue())
    index = json.loads((tars / "index.json").read_text())
    for entry in [index["dvla"]["meta"], *index["shardlist"]]:
        if entry["url"] == name:
            entry.update(filesize=len(out.getvalue()), crc32c=crc32c(out.getvalue()))
    (tars / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "beta-000000.tar",
            lambda n, d: None if n.endswith("000002.features.top.npy") else d,
            "beta-000000.tar is damaged .it has no",
        ),
        ("beta-000000.tar", lambda n, d: d.replace(b"(3, 8)", b"(8, 3)"), "beta-000000.tar is damaged .*not int8"),
        ("beta-000000.tar", lambda n, d: b"junk" if n.endswith("top.npy") else d, "beta-000000.tar is damaged"),
        (
            "beta-000000.tar",
            lambda n, d: d[:-4] + b"\0\0\0\1" if ".scales." in n else d,
            "does not give back|not finite",
        ),
        ("_meta.tar", lambda n, d: b"{}" if n == "alpha/tables.json" else d, "alpha/tables.json is damaged"),
        ("_meta.tar", lambda n, d: b"[1" if n == "cache/store.fingerprint.json" else d, "cache/store is not valid"),
        (
            "_meta.tar",
            lambda n, d: b'{"store": {}}' if n == "cache/store.fingerprint.json" else d,
            "'store.format' is missing",
        ),
        (
            "_meta.tar",
            lambda n, d: d[:40] + b"O" + d[41:] if n == "alpha/tables.action.npy" else d,
            "_meta.tar is damaged|not an export",
        ),
        (
            "_meta.tar",
            lambda n, d: None if n == "beta/tables.action.npy" else d,
            "it has no beta/tables.action.npy",
        ),
        (
            "_meta.tar",
            lambda n, d: d[:-4] + b"\0\0\0\1" if n == "beta/tables.action.npy" else d,
            "does not give back the exported cache",
        ),
    ],
)
def test_forged_content_is_refused(tars: Path, tmp_path: Path, name: str, change, message: str) -> None:
    """Altered together with the index: checksums agree, and still it is a line, not a traceback."""
    forge(tars, name, change)
    with pytest.raises(UserError, match=message) as error:
        import_cache(str(tars), tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back/manifest.json").exists()


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"dvla": {}}',
        b'{"dvla": {"export": 99}}',
        b'{"dvla": {"export": 1}}',
        b'{"dvla": {"export": 1, "meta": {"url": "../x"}, "quarantine": []}, "shardlist": []}',
    ],
)
def test_damaged_index(base: Path, tars: Path, tmp_path: Path, index: bytes) -> None:
    (tars / "index.json").write_bytes(index)
    with pytest.raises(UserError) as error:
        import_cache(str(tars), tmp_path / "back")
    assert str(tars) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "back").exists()
    with pytest.raises(UserError):
        export(base / "cache", str(tars), shard_nbytes=SHARD)


@pytest.mark.parametrize("form", ["pipe:cat {tars}/{{name}}", "{tars}"])
@pytest.mark.parametrize(
    "name",
    [
        "a.tar; touch {mark}",
        "$(touch {mark}).tar",
        "`touch {mark}`.tar",
        "../beta-000000.tar",
        "{tars}/beta-000000.tar",
        "a\n.tar",
    ],
)
def test_a_strangers_index_names_files_beside_it_only(tars: Path, tmp_path: Path, form: str, name: str) -> None:
    """Its names reach a shell (pipe:) and paths: one that is more than a name is refused before anything is opened."""
    mark = tmp_path / "mark"
    index = json.loads((tars / "index.json").read_text())
    index["shardlist"][0]["url"] = name.format(mark=mark, tars=tars)
    (tars / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected match pattern") as error:
        import_cache(form.format(tars=tars), tmp_path / "back")
    assert not mark.exists() and not (tmp_path / "back").exists() and "\n" not in str(error.value)


def test_damaged_caches_are_not_exported(base: Path, tmp_path: Path) -> None:
    for name, said in (
        ("alpha/features/front.aug1/c/1/0/0", "front.aug1/c/1/0/0"),
        ("beta/scales/top/c/0/0", "top/c/0/0"),
        ("beta/action/c/0/0", "beta/action"),
    ):
        cache = tmp_path / name.replace("/", "-")
        for file, data in tree(base / "cache").items():
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes(data)
        data = bytearray((cache / name).read_bytes())
        data[5] ^= 16
        (cache / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{said}.* is damaged"):
            export(cache, str(tmp_path / f"{cache.name}-out"), shard_nbytes=SHARD)
        assert not (tmp_path / f"{cache.name}-out/index.json").exists()


def test_reader_without_checks_names_a_damaged_tar(tars: Path) -> None:
    data = (tars / "beta-000000.tar").read_bytes()
    (tars / "beta-000000.tar").write_bytes(data.replace(b"(3, 8)", b"(8, 3)"))
    beta = WebDatasetCache.open(tars).named("beta")
    with pytest.raises(UserError, match="beta-000000.tar is damaged"):
        beta.features("top", np.array([0]))


def test_another_version_of_zstd_gives_the_same_numbers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other compressed bytes and metadata are counted, not refused; a later build resumes the cache."""
    from numcodecs import Zstd

    from dvla.cache.store import zarr_format as layout

    document = layout.array_document
    with monkeypatch.context() as patch:
        patch.setattr("numcodecs.Zstd", lambda level: Zstd(level=19))
        patch.setattr(
            layout, "array_document", lambda *a, **k: {**document(*a, **k), "attributes": {"written": "elsewhere"}}
        )
        report = import_cache(str(base / "tars"), tmp_path / "back")
    first, second = Cache.open(base / "cache"), Cache.open(tmp_path / "back")
    assert (
        report.rewritten > 20 and verify_checksums(tmp_path / "back") == [] and first.fingerprint == second.fingerprint
    )
    for a, b in zip(first.datasets, second.datasets):
        rows = a.frame_of(np.arange(a.observations))
        for view, variant in itertools.product(a.views, (0, 1)):
            for x, y in zip(a.records(view, rows, variant), b.records(view, rows, variant)):
                np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a.action, b.action)


# --- commands ---


def test_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        [
            "cache",
            "export",
            str(base / "cache"),
            "--format",
            "webdataset",
            "--out",
            str(tmp_path / "tars"),
            "--shard-size",
            "150KB",
        ]
    )
    assert "observations in" in capsys.readouterr().out and tree(tmp_path / "tars") == tree(base / "tars")
    run(["cache", "import", str(tmp_path / "tars"), "--out", str(tmp_path / "back")])
    assert "byte for byte" in capsys.readouterr().out and tree(tmp_path / "back") == tree(base / "cache")
    for arguments in (
        ["export", str(tmp_path), "--out", "x"],
        ["export", str(base / "cache"), "--out", "x", "--shard-size", "big"],
        ["import", str(tmp_path / "none"), "--out", str(tmp_path / "x")],
        ["import", str(base / "cache"), "--out", "x"],
    ):
        with pytest.raises(UserError) as error:
            run(["cache", *arguments])
        assert "\n" not in str(error.value)


def test_memory_does_not_grow_with_a_tar(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a single observation give the same bytes: nothing depends on how much is read at a time."""
    from dvla.cache.store.webdataset import samples as webdataset_samples

    for module in (webdataset_samples, exchange):
        monkeypatch.setattr(module, "BLOCK_NBYTES", 1)
    export(base / "cache", str(tmp_path / "tars"), shard_nbytes=SHARD)
    import_cache(str(tmp_path / "tars"), tmp_path / "back")
    assert tree(tmp_path / "tars") == tree(base / "tars") and tree(tmp_path / "back") == tree(base / "cache")
    assert webdataset_io.META in tree(tmp_path / "tars")
