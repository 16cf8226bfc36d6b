"""Panels while a run trains: when they are due, how long they may take, where they are written. None can stop a run.

RUN/panels/step-00000500/A1.png …        the panels of that step
RUN/panels/step-00000500/findings.json   panel → its title
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ....cache.loader.sample import Sample
from ....common.figures import png, style_named
from ....common.files import write_file
from ..context import Session
from ..run_log import RunLog, read_log
from .catalogue import PANELS, Panel, due
from .collect import collect
from .data import PanelData

GUESS = 0.3  # seconds that a panel is assumed to take before the first one
LATELY = 256  # latest batches whose datasets are counted


class Panels:
    """The panels of one call of the training loop. Every process predicts; rank 0 draws."""

    def __init__(self, session: Session, quotas: np.ndarray) -> None:
        """`quotas` [K]: samples of each dataset in a block of the loader's order."""
        self.session, self.config, self._quotas = session, session.config.panels, quotas
        self._began, self._lately = time.perf_counter(), deque[np.ndarray](maxlen=LATELY)
        self._spent = self._drawing = self._looked = 0.0  # seconds: in all, drawing, for the last predictions
        self._drawn, self._said = 0, False
        self._last: PanelData | None = None

    def counting(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the `samples` and count their datasets."""
        for sample in samples:
            self._lately.append(sample.drawn.dataset)
            yield sample

    def turn(self, step: int, evaluated: bool) -> list[Panel]:
        """The panels to draw after `step`, the same in every process: those that are due, unless they would take more
        than `panels.share` of the time so far. The last step of a run with `panels.every` steps always has them."""
        every, share, world = self.config.every, self.config.share, self.session.world
        last = step == self.session.config.steps and step >= every
        panels = due(step, every, evaluated, last) if last or not evaluated or step >= every else []
        if not panels or last or share == 1:
            return panels
        each = self._drawing / self._drawn if self._drawn else GUESS
        elapsed = time.perf_counter() - self._began
        late = world.any(world.main and self._spent + each * len(panels) + self._looked > share * elapsed)
        if late and not self._said:
            self._said = True
            self.session.say(
                f"no panels after step {step}: they would take more than {100 * share:g} % of the time so far; "
                "later ones are drawn when they take less, or give --set panels.share=1"
            )
        return [] if late else panels

    def look(self, step: int, panels: list[Panel], evaluated: bool) -> PanelData | None:
        """Predictions of the current weights, or the last ones where neither `panels` nor an evaluation need them;
        None where that fails, which is logged."""
        if self._last is not None and not evaluated and not any(panel.predicts for panel in panels):
            return dataclasses.replace(self._last, step=step)
        began = time.perf_counter()
        try:
            self._last = collect(self.session, step)
            return self._last
        except Exception as error:  # whatever it is, the run is worth more
            self._failed("no panels", step, error)
            return None
        finally:
            self._looked = time.perf_counter() - began
            self._spent += 0.0 if evaluated else self._looked  # an evaluation needs them in any case

    def draw(self, panels: list[Panel], seen: PanelData | None, run_log: RunLog | None) -> None:
        """Draw `panels` from `seen`, write and log them; a failure is logged. `run_log`: None except on rank 0."""
        if run_log is None or seen is None or not panels:
            return
        began = time.perf_counter()
        folder = panel_folder(Path(self.session.config.out), seen.step)
        findings: dict[str, str] = {}
        seen.log, seen.configured, seen.drawn = read_log(folder.parents[1]), self._quotas, self._counts()
        for panel in panels:
            try:
                figure = panel.draw(seen, style_named(self.config.style))
                write_file(folder / f"{panel.key}.png", png(figure))
                findings[panel.key] = " ".join(figure.get_suptitle().split())
            except Exception as error:
                self._failed(f"panel {panel.key}", seen.step, error)
        try:
            write_file(folder / "findings.json", (json.dumps(findings, indent=1, ensure_ascii=False) + "\n").encode())
            files = {f"panels/{key} {PANELS[key].name}": (folder / f"{key}.png", x) for key, x in findings.items()}
            run_log.images(seen.step, files)
        except Exception as error:
            self._failed("panels", seen.step, error)
        elapsed = time.perf_counter() - began
        self._spent += elapsed
        self._drawing += elapsed
        self._drawn += len(panels)

    def _failed(self, what: str, step: int, error: Exception) -> None:
        self.session.say(f"{what} after step {step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _counts(self) -> np.ndarray:
        """[K]: this process's samples of each dataset in the latest batches since the run began or resumed."""
        seen = np.concatenate([*self._lately, np.empty(0, np.int64)])
        return np.bincount(seen, minlength=len(self.session.cache.datasets))


def panel_folder(run: Path, step: int) -> Path:
    """The folder of the panels of `step`."""
    return run / "panels" / f"step-{step:08d}"


def panel_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every step with panels, ascending."""
    found = ((re.fullmatch(r"step-(\d{8})", p.name), p) for p in (run / "panels").glob("step-*"))
    return sorted((int(match[1]), p) for match, p in found if match)
