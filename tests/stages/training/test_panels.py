"""The 17 panels on policies whose findings are known: what their titles say and what they plot, never pixels."""

from __future__ import annotations

import io
import re
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dvla.cache.actions.slots import SLOTS, slots
from dvla.common.figures import CYCLE, DARK, LIGHT, png, style_named
from dvla.errors import UserError
from dvla.stages.training.panels.catalogue import PANELS, due
from dvla.stages.training.panels.data import PanelData, principal
from support import panel_samples as samples

KINDS = {"perfect": samples.perfect, "collapsed": samples.collapsed, "guessing": samples.guessing}


@pytest.fixture(scope="module")
def looks() -> dict[str, PanelData]:
    return {name: make() for name, make in KINDS.items()}


def draw(key: str, data: PanelData) -> Figure:
    return PANELS[key].draw(data, LIGHT)


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


# --- what the titles say --------------------------------------------------------------------------------------------

FINDINGS = {  # panel → part of its title for a perfect, a collapsed and a guessing policy
    "A1": ("mean distance 0.0009", "100 % of the drift arrows point to the expert", "mean distance 0.1"),
    "A3": ("8 of 8 moving dimensions predicted", "no dimension is predicted better than by its mean", "0 of 8 moving"),
    "A4": ("none stands out", "MAE 0.1", "MAE 0.1"),
    "A5": (
        "fine detail is learned",
        "neither coarse nor fine structure is learned",
        "neither coarse nor fine structure is learned",
    ),
    "B1": (
        "Coverage 100 %: predictions cover",
        "Coverage 1 %: the policy has collapsed",
        "predictions cover",
    ),
    "B2": ("0.001", "0.1", "No hot spot"),
    "B3": ("Regions are similar", "No region is predicted", "No region is predicted"),
    "B4": ("they overlap", "they diverge", "they diverge"),
    "B5": ("no harder than its beginning",) * 3,
    "C1": ("little is left to transport", "% of it (C1)", "(good: over 50 %)"),
    "C2": ("100 % of the expert's modes", "most are missing", "of the expert's modes"),
    "C3": ("as smooth as the expert", "smoother than the expert", "it jitters"),
    "D2": ("× smaller",) * 3,
}


@pytest.mark.parametrize("key", FINDINGS)
def test_titles_say_the_finding(looks, key: str) -> None:
    for (name, data), expected in zip(looks.items(), FINDINGS[key]):
        said = title(draw(key, data))
        assert expected in said and said.endswith(f"({key})"), (name, said)


def test_titles_of_the_run() -> None:
    stuck, unbalanced = samples.perfect(log=samples.log(worse=True)), samples.perfect(drawn=np.array([500, 10]))
    assert "All datasets improve" in title(draw("D3", samples.perfect()))
    assert "1 of 2 datasets no longer improve: dex<hand>" in title(draw("D3", stuck))
    assert "worst: dex<hand>, 0.4000" in title(draw("D1", stuck))
    assert "The mixture is as configured; smallest share 25.0 %" in title(draw("D4", samples.perfect()))
    assert "dex<hand> has 2.0 % of the samples, 25.0 % are configured" in title(draw("D4", unbalanced))
    assert "still falling" in title(draw("A2", samples.perfect()))
    flat = [{**line, "mean_square": [0.3, 0.4, 0.5]} for line in samples.log()]
    assert "flat" in title(draw("A2", samples.perfect(log=flat)))
    rising = [{**line, "mean_square": [x * line["step"] for x in (0.3, 0.4, 0.5)]} for line in samples.log()]
    assert "rising" in title(draw("A2", samples.perfect(log=rising)))
    worse = [
        {**line, "mse": line["step"], **({"eval/mse": line["step"]} if "eval/mse" in line else {})}
        for line in samples.log()
    ]
    assert "it got worse" in title(draw("D2", samples.perfect(log=worse)))


def test_a_hot_spot_and_growth_are_named() -> None:
    target, active, dataset = samples.expert()
    draws = np.repeat(target[:, None], samples.G, 1)
    draws[..., 4, SLOTS["gripper_open"]] += 0.5  # one dimension at one step
    data = samples.panel_data(np.where(active[:, None], draws, 0), target, active, dataset)
    assert "Hot spot: gripper_open at step 5, 0.500" in title(draw("B2", data))
    assert "Hardest dimension: gripper_open" in title(draw("A4", data)) and "× the median" in title(draw("A4", data))
    growing = np.repeat(target[:, None], samples.G, 1) + 0.05 * np.arange(1, samples.T + 1)[None, None, :, None]
    data = samples.panel_data(np.where(active[:, None], growing, 0), target, active, dataset)
    assert "+700 % from first to last step: it rises too fast" in title(draw("B5", data))


# --- what is plotted ------------------------------------------------------------------------------------------------


def test_prediction_scatter_plots_pairs_that_count(looks) -> None:
    data = looks["guessing"]
    axis = next(a for a in draw("A3", data).axes if a.get_title().startswith("gripper_open"))
    on = data.active[..., SLOTS["gripper_open"]]
    x, y = axis.lines[1].get_data()
    assert np.array_equal(x, data.target[..., SLOTS["gripper_open"]][on]) and np.array_equal(
        y, data.pred[..., SLOTS["gripper_open"]][on]
    )
    assert len(x) == 24 * samples.T - 3  # the cut chunk's last steps do not count


def test_bars_and_maps_hold_the_errors(looks) -> None:
    data = looks["collapsed"]
    for key, panel_axes in (("A4", draw("A4", data).axes[0]), ("B2", draw("B2", data).axes[0])):
        names = [label.get_text() for label in panel_axes.get_yticklabels()]
        assert (
            names == [slots()[i].name for i in data.used] and "eef_vel_x" in names and "dex_finger_joint_3_pos" in names
        ), key
    error = np.abs(data.error)
    image = draw("B2", data).axes[0].images[0].get_array()
    place = SLOTS["eef_vel_y"]
    assert np.allclose(image[data.used.index(place)], np.nanmean(error[..., place], 0))
    widths = [bar.get_width() for bar in sorted(draw("A4", data).axes[0].patches, key=lambda bar: bar.get_y())]
    assert np.allclose(widths, data.of_slot("mae")[data.used])
    line = draw("B5", data).axes[0].lines[0].get_ydata()
    assert np.allclose(line, np.nanmean(np.nanmean(error, 2), 0))


def test_velocities_are_summed_to_a_way_in_metres() -> None:
    target, active, dataset = samples.expert()
    target[1::2] = 0.0
    target[..., SLOTS["eef_vel_x"]] = np.where(active[..., SLOTS["eef_vel_x"]], 0.5, 0)
    data = samples.panel_data(
        np.repeat(target[:, None], samples.G, 1), target, active, dataset, half_range=np.full((2, 128), 2.0, np.float32)
    )
    axis = draw("B4", data).axes[0]
    way = axis.lines[-2].get_xdata()  # 5 of 8 steps count: 0.5 · 2 m/s at 10 Hz
    assert np.allclose(way, 0.1 * np.arange(6)) and axis.get_xlabel() == "x (m)"


def test_spectrum_is_in_hertz() -> None:
    target, active, dataset = samples.expert()
    wave = np.where(active, np.sin(2 * np.pi * 2.5 * np.arange(samples.T) / 10)[None, :, None], 0).astype(
        np.float32
    )  # 2.5 Hz at 10 Hz
    data = samples.panel_data(np.repeat(wave[:, None], samples.G, 1), wave, active, dataset)
    axis = draw("C3", data).axes[2]
    x, y = axis.lines[0].get_data()
    assert x[y.argmax()] == 2.5 and axis.get_xlabel() == "frequency (Hz)"
    mixed = samples.panel_data(np.repeat(wave[:, None], samples.G, 1), wave, active, dataset, hz=np.array([10.0, 20.0]))
    assert draw("C3", mixed).axes[2].get_xlabel() == "frequency (cycles per step)"


def test_following_the_drift_is_measured() -> None:
    data = samples.collapsed()
    right = draw("C1", data).axes[1]
    before, after = (float(re.search(r"mean (\S+)", text.get_text())[1]) for text in right.get_legend().get_texts())
    k, rows = data.groups[0]
    gap = data.flat(data.target, k, rows)[:, None] - data.flat(data.draws, k, rows)
    assert (
        before == pytest.approx((np.linalg.norm(gap, axis=2) / np.sqrt(gap.shape[2])).mean(), rel=1e-2)
        and after < 0.5 * before
    )
    assert 0 not in rows and {data.dataset[r] for r in rows} == {k}  # the cut chunk is in no set


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PANELS)
def test_axes_have_names_and_images_are_small(key: str) -> None:
    before, backend = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    figure = PANELS[key].draw(samples.guessing(), DARK)
    assert any(axis.get_xlabel() for axis in figure.axes) or figure.get_supxlabel()
    assert any(axis.get_ylabel() or axis.get_yticklabels() for axis in figure.axes) or figure.get_supylabel()
    assert figure.get_facecolor()[:3] == matplotlib.colors.to_rgb(DARK.back) and len(title(figure)) > 15
    image = png(figure)
    assert len(image) < 120_000 and Image.open(io.BytesIO(image)).format == "PNG"
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == backend  # nothing global


@pytest.mark.parametrize("key", PANELS)
def test_what_there_is_too_little_of_is_said(key: str) -> None:
    """One observation of one step, a standing expert, an empty log: every panel answers."""
    target, active, dataset = samples.expert()
    data = samples.panel_data(
        np.zeros((1, 2, 1, 128)),
        0 * target[1:2, :1],
        active[1:2, :1],
        dataset[1:2],
        log=[],
        drawn=None,
        configured=None,
    )
    figure = draw(key, data)
    assert title(figure).endswith(f"({key})")
    png(figure)


def test_heads_without_a_drift() -> None:
    silent = [{**line, "mean_square": [0.0, 0.0, 0.0]} for line in samples.log()]
    data = samples.perfect(noise=0, log=silent)
    assert "No drift is logged" in title(draw("A2", data)) and "There is no drift" in title(draw("A5", data))
    assert (
        "there is no drift" in title(draw("A1", data))
        and draw("D2", data).axes[2].get_title() == "this head has no drift"
    )


def test_catalogue_and_frequencies() -> None:
    assert list(PANELS) == [
        *(f"A{i}" for i in range(1, 6)),
        *(f"B{i}" for i in range(1, 6)),
        "C1",
        "C2",
        "C3",
        "D1",
        "D2",
        "D3",
        "D4",
    ]

    def keys(*how) -> set[str]:
        return {p.key for p in due(*how)}

    assert keys(500, 0, True) == set() and keys(500, 0, False, True) == set()
    assert keys(200, 500, False) == {"A2"} and keys(100, 500, False) == set()
    assert keys(500, 500, False) == {"A1", "A3", "A4", "A5", "B1", "B2", "B5", "C1", "D2"}
    assert keys(1000, 500, True) == keys(500, 500, False) | {"A2", "B3", "B4", "C3", "D1", "D3", "D4"}
    assert keys(2000, 500, False) >= {"C2"} and keys(40, 10, True) == set(PANELS)
    assert keys(7, 500, False, True) == set(PANELS)  # the run's last step


def test_names_and_regions() -> None:
    by_name = {slot.name: slot for slot in slots()}
    assert len(slots()) == 128 and len(by_name) == 128
    assert by_name["gripper_open"].region == "gripper" and slots()[SLOTS["gripper_open"]].name == "gripper_open"
    assert (by_name["left_eef_pos_x"].region, by_name["left_eef_pos_x"].unit) == ("left hand position", "m")
    assert (by_name["arm_joint_3_vel"].region, by_name["arm_joint_3_vel"].unit) == ("arm velocity", "rad/s")
    assert (
        by_name["eef_angular_vel_yaw"].unit == "rad/s"
        and by_name["eef_vel_x"].unit == "m/s"
        and by_name["eef_angle_2"].unit == "6D"
    )
    assert by_name["base_angular_vel"].unit == "rad/s" and by_name["gripper_open_vel"].unit == "1/s"
    assert not [slot for slot in slots() if slot.region == "other" and not slot.name.startswith("slot ")]


def test_principal_axes() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 5)) * (5, 2, 0.1, 0.1, 0.1) + 3
    mean, axes, shares = principal(values)
    assert (
        np.allclose(mean, values.mean(0))
        and np.allclose(np.abs(axes), np.eye(5)[:2], atol=0.1)
        and shares[0] > shares[1] > 0
    )
    assert np.array_equal(principal(values)[1], axes) and (axes.max(1) > 0.9).all()
    assert principal(np.zeros((1, 1)))[1].shape == (2, 1)


def test_styles() -> None:
    assert style_named("dark") is DARK and len(set(CYCLE)) == 8
    with pytest.raises(UserError, match="did you mean 'light'"):
        style_named("ligth")
