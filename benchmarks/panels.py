"""The images of docs/panels.md: the panels of a policy that learns and of one that has collapsed, from two real runs.

    dvla demo --out runs/demo                       # records, caches
    python benchmarks/panels.py --cache runs/demo/cache --work runs/panels --out docs/images

Both runs train the demo's tiny network on the demo's cache. The collapsed one is a regression that sees neither images
nor state, so the best it can do is to predict the mean. Finished runs in --work are reused.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from dvla.cache.store.cache import Cache
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.common.figures import LIGHT, png
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.load import load_net
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import Session
from dvla.stages.training.panels.catalogue import PANELS
from dvla.stages.training.panels.collect import collect
from dvla.stages.training.panels.data import PanelData
from dvla.stages.training.run_log import read_log
from dvla.stages.training.train import train

SETTINGS: dict[str, Any] = {
    "model_size": "tiny",
    "dit": {"horizon": 8, "width": 128},
    "draws": 2,
    "batch_size": 64,
    "loss": {"drift_weight": 0.005},
    "cpu_threads": 1,
    "masking": {"text": 0.0, "images": 0.0, "proprio": 0.0},
    "optimizer": {"lr": 1e-3, "warmup": 50, "projector_lr_scale": 1.0},
    "eval_every": 100,
    "save_every": 200,
    "log_every": 20,
    "panels": {"every": 0},
}
RUNS: dict[str, dict[str, Any]] = {
    "trained": {"steps": 600},
    "collapsed": {
        "steps": 120,
        "batch_size": 32,
        "eval_every": 40,
        "loss": {"kind": "mse"},
        "blind": True,
        "masking": {"text": 0.0, "images": 0.0, "proprio": 1.0},
    },
}
PAGES = {
    "panels_drift": ("A1", "A2", "A5", "C1"),
    "panels_errors": ("A3", "A4", "B2", "B3", "B5"),
    "panels_distribution": ("B1", "B4", "C2", "C3"),
    "panels_run": ("D1", "D2", "D3"),
}
WIDTH, GAP = 560, 16  # pixels of a panel, and between two


def look(cache: Path, run: Path, name: str) -> PanelData:
    """Train the run unless it is finished, and collect what the panels show."""
    config = from_mapping(TrainConfig, {"cache": str(cache), "out": str(run), **SETTINGS, **RUNS[name]})
    found = ck.checkpoints(run)
    if not found or read_json(found[-1] / "state.json")["step"] < config.steps:
        train(config, lambda line: print(name, line["step"], line["loss"]))
    folder = ck.resolve(run)
    net = load_net(read_json(folder / "policy.json"), folder)
    data = collect(Session(config, Cache.open(cache), net, {}), config.steps)
    data.log = read_log(run)
    return data


def montage(keys: tuple[str, ...], looks: dict[str, PanelData], out: Path) -> None:
    """A row per panel, a column per run."""
    rows = []
    for key in keys:
        images = [Image.open(io.BytesIO(png(PANELS[key].draw(data, LIGHT)))).convert("RGB") for data in looks.values()]
        rows.append([i.resize((WIDTH, round(i.height * WIDTH / i.width)), Image.Resampling.LANCZOS) for i in images])
    height = sum(max(p.height for p in row) + GAP for row in rows)
    page, y = Image.new("RGB", (WIDTH * len(looks) + GAP * (len(looks) - 1), height - GAP), "white"), 0
    for row in rows:
        for column, p in enumerate(row):
            page.paste(p, (column * (WIDTH + GAP), y))
        y += max(p.height for p in row) + GAP
    page.quantize(128).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the demo's cache")
    parser.add_argument("--work", type=Path, default=Path("runs/panels"), help="folder of both runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the images")
    args = parser.parse_args()
    looks = {name: look(args.cache, args.work / name, name) for name in RUNS}
    for name, data in looks.items():
        for panel in PANELS.values():
            if panel.key != "D4":  # a finished run has no data for it
                print(f"{name}: {panel.draw(data, LIGHT).get_suptitle()}".replace("\n", " "))
    for name, keys in PAGES.items():
        montage(keys, looks, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
