"""All 17 panels, A1 to D4: how often each is drawn, what it shows and what good looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from ....common.figures import Style
from . import accuracy, curves, distribution, drift
from .data import PanelData


@dataclass(frozen=True)
class Panel:
    """One of the 17."""

    key: str
    name: str
    every: int  # training steps between two figures when `panels.every` is 500; 0: at every evaluation
    draw: Callable[[PanelData, Style], Figure]
    good: str  # what it shows where a run learns
    predicts: bool = True  # whether it needs predictions, or only the log


PANELS = {
    panel.key: panel
    for panel in (
        Panel("A1", "Drifting field", 500, drift.drifting_field, "arrows point to the expert and get shorter"),
        Panel(
            "A2",
            "Drift magnitude",
            200,
            drift.drift_trend,
            "falling; on a plateau a hybrid head may need a greater loss.drift_weight",
            False,
        ),
        Panel("A3", "Prediction scatter", 500, accuracy.prediction_scatter, "points on the diagonal, high R²"),
        Panel("A4", "Error by dimension", 500, accuracy.error_by_dimension, "low bars of one length"),
        Panel(
            "A5",
            "Drift by temperature",
            500,
            drift.temperature_drift,
            "lowest over highest temperature below 0.5: fine detail is learned",
        ),
        Panel(
            "B1",
            "Action distribution",
            500,
            distribution.action_distribution,
            "coverage near 100 %; below 20 % the policy has collapsed",
        ),
        Panel("B2", "Error heat map", 500, accuracy.error_heatmap, "one color; hot spots are hard dimensions or times"),
        Panel("B3", "Regions", 1000, accuracy.region_summary, "all regions similar"),
        Panel("B4", "Trajectories", 1000, distribution.trajectories, "the lines overlap, grey connectors are short"),
        Panel(
            "B5", "Error over the chunk", 500, accuracy.temporal_error, "flat or slowly rising; more than 50 % is bad"
        ),
        Panel(
            "C1",
            "Transport map",
            500,
            drift.transport_map,
            "following the drift removes more than half of the distance",
        ),
        Panel("C2", "Mode coverage", 2000, distribution.mode_coverage, "the predicted cloud overlaps the expert's"),
        Panel("C3", "Smoothness", 1000, distribution.smoothness, "speed, jerk and spectrum as the expert's"),
        Panel(
            "D1",
            "Evaluation by dataset",
            0,
            curves.eval_dashboard,
            "low errors, correlation near 1, coverage near 100 %",
            False,
        ),
        Panel("D2", "Training curves", 500, curves.training_curves, "error and drift fall", False),
        Panel(
            "D3",
            "Learning curves",
            0,
            curves.learning_curves,
            "all datasets improve; a stagnant one has a problem with its data",
            False,
        ),
        Panel("D4", "Data balance", 0, curves.data_balance, "samples as configured", False),
    )
}
BASE = 500  # steps of `Panel.every`, which `panels.every` scales


def due(step: int, every: int, evaluated: bool, last: bool = False) -> list[Panel]:
    """The panels to draw after `step`; `every` as in `panels.every` (0: never). At the run's last step all are."""
    if not every:
        return []
    return [
        p
        for p in PANELS.values()
        if last or (evaluated if not p.every else step % max(1, round(p.every * every / BASE)) == 0)
    ]
