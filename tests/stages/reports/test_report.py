"""Reports and comparisons: one page that needs nothing else, says what the run says, escapes what users wrote, and
works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dvla.common.documents import json_bytes
from dvla.common.figures import LIGHT, finish, new_figure, png
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.reports.compare import compare, verdict, write_comparison
from dvla.stages.reports.html import MARK, number, require_page
from dvla.stages.reports.report import ReportConfig, panels, read_evaluation, read_run, report
from dvla.stages.training.panels.catalogue import PANELS
from support import panel_samples as samples
from support.cli_runner import Dvla, refused
from support.html_links import Links
from support.run_samples import make_document, make_robot

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert(1)</script>"


def write_run(folder: Path, *, worse: bool = False, **settings: Any) -> Path:
    """A run folder as training leaves it, with small panels after steps 500 and 1000, and a nasty setting."""
    folder.mkdir(parents=True)
    config = {"cache": f"s3://key:hunter2@host/{NASTY}", "out": str(folder), "steps": 1200, "seed": 0, **settings}
    (folder / "config.json").write_bytes(json_bytes(config))
    (folder / "environment.json").write_bytes(json_bytes({"device": "an abacus", "packages": {"dvla": "0"}}))
    lines = [{"samples_per_second": 100.0, "wait_share": 0.1, "binds": "disk", **line} for line in samples.log(worse)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    datasets = [
        {**make_robot(), "name": name, "embodiment": body, "views": ["top"], "control_hz": 10.0}
        for name, body in zip(samples.DATASETS, samples.EMBODIMENTS)
    ]
    encoder = {"spec": {"path": "vlm"}, "fingerprint": {"vlm": "an eye"}}
    ck.save_checkpoint(
        folder,
        1200,
        {},
        {"policy": make_document(datasets, encoder=encoder), "state": {"step": 1200}},
        1,
    )
    for step, keys in ((200, ("A2",)), (500, ("A1", "B1")), (1000, ("A1", "A2", "B1"))):
        shown = folder / "panels" / f"step-{step:08d}"
        shown.mkdir(parents=True)
        for key in keys:
            (shown / f"{key}.png").write_bytes(png(finish(new_figure(LIGHT, 2, 1), f"{key} {step}", LIGHT)))
        (shown / "findings.json").write_bytes(json_bytes({key: f"{NASTY} after {step} ({key})" for key in keys}))
    return folder


def write_evaluation(folder: Path) -> Path:
    """What `dvla eval --out` leaves; the video is no video."""
    (folder / "videos").mkdir(parents=True)
    entry = {
        "success": 0.9,
        "ci95": [0.7, 0.97],
        "episodes": 20,
        "mean_return": 1.0,
        "ms_per_action": 12.3,
        "expert": 1.0,
        "random": 0.0,
        "blind": 0.4,
    }
    (folder / "summary.json").write_bytes(
        json_bytes({"policy": "runs/a", "blind_is": "another run", "tasks": {"metaworld/push-v3": entry}})
    )
    Image.new("RGB", (64, 32), "red").save(folder / "videos" / "metaworld_push-v3.png")
    (folder / "videos" / "metaworld_push-v3.mp4").write_bytes(b"video")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    base = tmp_path_factory.mktemp("report")
    write_run(base / "run")
    report(ReportConfig(base / "run", base / "report.html", (write_evaluation(base / "eval"),)))
    yield base / "report.html", (base / "report.html").read_text()


def test_the_page_needs_nothing_else(page) -> None:
    found = Links(page[1])
    assert found.addresses and all(a.startswith(("data:image/", "data:video/", "#")) for a in found.addresses)
    assert (
        "link" not in found.tags
        and "iframe" not in found.tags
        and "@import" not in page[1]
        and not re.search(r"url\(", page[1])
    )
    assert "http:" not in page[1] and "https:" not in page[1]
    assert all(f'id="{a[1:]}"' in page[1] for a in found.addresses if a.startswith("#"))


def test_the_page_says_what_the_run_says(page) -> None:
    text = html.unescape(" ".join(Links(page[1]).text.split()))
    held = [line for line in samples.log() if "eval/mse" in line]
    assert (
        f"Step 1,200 of 1,200; held-out MSE {held[0]['eval/mse']:.4f} → {held[-1]['eval/mse']:.4f}, which is its best."
        in text
    )
    for words in (
        "dex<hand>",
        "cup/arm",
        "an abacus",
        "an eye",
        "90 %",
        "70 – 97 %",
        "another run",
        "Findings of the panels after step 1,000",
        "drawn after step 1,000",
        PANELS["B1"].good,
    ):
        assert words in text, words
    assert "hunter2" not in page[1]  # of an address in the settings


def test_what_users_wrote_is_escaped(page) -> None:
    assert page[1].count("<script>") == 1 and "alert(1)</script>" not in page[1] and "&lt;script&gt;alert(1)" in page[1]
    assert page[1].splitlines()[1] == MARK


def test_the_slider_shows_the_newest_image_up_to_a_step(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    found = panels(run, 12)
    assert found["positions"] == [500, 1000] and not found["thinned"]  # A2 alone is no position
    steps = {p["key"]: [None if i is None else found["images"][i]["step"] for i in p["at"]] for p in found["panels"]}
    assert steps == {"A1": [500, 1000], "A2": [200, 1000], "B1": [500, 1000]}
    assert found["findings"][0]["finding"] == f"{NASTY} after 1000"
    one = panels(run, 1)
    assert one["positions"] == [500] or one["positions"] == [1000]
    assert "1 of the 2 steps" in one["thinned"]


def test_a_run_with_little_to_tell(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"cache": "c", "out": "o", "steps": 10}))
    with pytest.raises(UserError, match="has logged nothing yet"):
        report(ReportConfig(run, tmp_path / "r.html"))
    (run / "log.jsonl").write_text(
        json.dumps({"step": 1, "loss": 1.0, "mse": 1.0, "samples_per_second": 1.0, "wait_share": 0.0}) + "\n"
    )
    report(ReportConfig(run, tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert (
        "no evaluation on held-out episodes yet" in text
        and "No panels were drawn" in text
        and "an earlier release" in text
    )


def test_what_cannot_be_reported_is_refused(tmp_path: Path, dvla: Dvla) -> None:
    run = write_run(tmp_path / "run")
    refused(dvla("report", tmp_path, "-o", tmp_path / "r.html"), "is not a run folder")
    refused(dvla("report", run, "-o", tmp_path / "r.pdf"), "ends in .html")
    refused(dvla("report", run, "--eval", run, "-o", tmp_path / "r.html"), "holds no evaluation")
    (tmp_path / "mine.html").write_text("<p>my thesis</p>")
    refused(dvla("report", run, "-o", tmp_path / "mine.html"), "was not written by dvla")
    assert (tmp_path / "mine.html").read_text() == "<p>my thesis</p>"
    refused(dvla("report", run, "-o", tmp_path / "no" / "such" / "r.html", "--steps", "0"), "--steps is 0")
    (tmp_path / "again.html").write_text(f"<!doctype html>\n{MARK}\n")
    require_page(tmp_path / "again.html")


def test_a_video_too_large_is_reported(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval")
    (folder / "videos" / "metaworld_push-v3.mp4").write_bytes(b"x" * (7 << 20))
    video = read_evaluation(folder)["videos"][0]
    assert video["video"] == "" and "too large" in video["note"] and video["still"].startswith("data:image/jpeg")


def test_numbers() -> None:
    assert [number(v) for v in (None, float("nan"), 1200, 0.000123456, 12.3456, True, "a")] == [
        "–",
        "–",
        "1,200",
        "0.0001235",
        "12.35",
        "True",
        "a",
    ]


# --- compare --------------------------------------------------------------------------------------------------------


def test_comparison_of_two_runs(tmp_path: Path, dvla: Dvla) -> None:
    a, b = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", worse=True, optimizer={"lr": 1e-5})
    found = compare((a, b))
    assert found.names == ("a", "b") and {row.name for row in found.settings} == {
        "seed",
        "optimizer.lr",
    }  # not out; defaults count
    rows = {row.name: row for row in found.datasets}
    assert rows["dex<hand>"].best == (0,) and rows["cup/arm"].best == ()  # equal
    assert "No run is ahead" in verdict(found)  # the same over everything
    write_comparison(found, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert (
        all(address.startswith("data:") for address in Links(page).addresses)
        and "<script" not in page
        and "optimizer.lr" in page
    )
    result = dvla("compare", a, b, "-o", tmp_path / "c.html")
    assert result.code == 0 and "optimizer.lr" in result.out and "dex<hand>" in result.out and "c.html" in result.out
    refused(dvla("compare", a), "give at least two")
    refused(dvla("compare", a, a), "give at least two")


# --- a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page, tmp_path: Path, width: int) -> None:
    """Nothing is wider than the window, scripts raise nothing, the slider changes images and captions. Offline: no
    address is asked for."""
    probe = """<script>addEventListener("load", () => {
      const slider = document.getElementById("step"); slider.value = 0; slider.dispatchEvent(new Event("input"));
      const page = document.documentElement, width = page.clientWidth;
      const bad = [...document.querySelectorAll("main > *")]
        .filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.tagName);
      document.title = JSON.stringify({inner: innerWidth, wider: page.scrollWidth - width, bad,
        shown: document.getElementById("shown").textContent,
        note: document.querySelector('[data-drawn="A2"]').textContent,
        broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length});
    });</script>"""
    framed = html.escape(page[1].replace("</body>", probe + "</body>"))
    (tmp_path / "probe.html").write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:2000px" srcdoc="{framed}"></iframe>'
        '<pre id="out"></pre><script>setInterval(() => { document.getElementById("out").textContent = '
        'document.getElementById("f").contentDocument.title }, 50)</script>'
    )
    out = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--virtual-time-budget=4000",
            "--dump-dom",
            f"file://{tmp_path}/probe.html",
        ],
        capture_output=True,
        text=True,
        timeout=240,
    ).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', out, re.S)[1]))
    assert found == {"inner": width, "wider": 0, "bad": [], "shown": "500", "note": "drawn after step 200", "broken": 0}
