"""Images of a colored point cloud from four fixed cameras, rendered off screen by VTK (through PyVista), no display
needed.

The cameras stand in the frame of the points (m, z up), around its origin, where the object is: the positions and
targets of the research plan. VTK only projects and hides: points are flat squares, big enough to close the surface, in
colors made here, with no lighting, smoothing or randomness, so that one cloud always gives the same images on one
machine (another OpenGL driver may round the edge of a point otherwise). Letters: N points, S image size.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import UserError

SIZE = 448  # S, pixels
VERSION = 1  # raised when the same cloud gives other images; part of the hash of rendered views
_BACKGROUND = (255, 255, 255)
_LIGHT = np.array([0.36, 0.24, 0.90])  # direction to the light, unit length, in the frame of the points
_ONE_AT_A_TIME = threading.Lock()  # an OpenGL context belongs to one thread


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in the frame of the points, m."""

    position: tuple[float, float, float]
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)
    view_angle: float = 30.0  # degrees from edge to edge: 0.31 m at the object for front and side


CAMERAS: dict[str, Camera] = {
    "front": Camera((0.5, 0.0, 0.3)),
    "side": Camera((0.0, 0.5, 0.3)),
    "top": Camera((0.0, 0.0, 0.8), up=(-1.0, 0.0, 0.0), view_angle=22.0),  # the front camera's side is below
    "wrist": Camera((0.1, 0.0, 0.15), target=(0.0, 0.0, 0.05), view_angle=60.0),  # a close look
}


def shade(points: np.ndarray, base: np.ndarray, normals: np.ndarray | None = None) -> np.ndarray:
    """Colours uint8 [N, 3] that show the shape of `points [N, 3]`, N ≥ 1: `base [N, 3]` (0-255) darkened by the angle
    between the unit `normals [N, 3]` and the light or, without normals, by height."""
    if normals is not None:
        light = 0.3 + 0.7 * np.abs(normals @ _LIGHT)
    else:
        low, high = points[:, 2].min(), points[:, 2].max()
        light = 0.5 + 0.5 * (points[:, 2] - low) / max(high - low, 1e-6)
    return np.clip(base * light[:, None] + 0.5, 0, 255).astype(np.uint8)


def render(
    points: np.ndarray, colors: np.ndarray, spacing: float, cameras: Mapping[str, Camera] = CAMERAS
) -> dict[str, np.ndarray]:
    """The cloud seen by each camera: name → uint8 [S, S, 3] RGB.

    `points [N, 3]` in m, `colors` uint8 [N, 3], `spacing`: distance (m) between neighboring points of a surface. Safe
    in any thread. `UserError` when PyVista is not installed or OpenGL has nothing to render with.
    """
    try:
        import pyvista
        from vtkmodules.vtkCommonCore import vtkLogger
    except ImportError as error:
        raise UserError(
            f"views of a point cloud are rendered with PyVista, which cannot be imported ({error}); install it with "
            "pip install 'dvla[render]'"
        ) from None
    vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)  # it would report each display that it tries in vain
    cloud = pyvista.PolyData(np.ascontiguousarray(points, np.float32))
    with _ONE_AT_A_TIME:
        _prefer_egl_without_x()
        plotter: Any = pyvista.Plotter(off_screen=True, window_size=[SIZE, SIZE], lighting=None)
        try:
            _require_opengl(type(plotter.render_window).__name__)
            plotter.set_background(tuple(c / 255 for c in _BACKGROUND))
            plotter.disable_anti_aliasing()
            actor = plotter.add_points(
                cloud,
                scalars=colors,
                rgb=True,
                lighting=False,
                render_points_as_spheres=False,
                reset_camera=False,
                show_scalar_bar=False,
            )
            return {name: _image(plotter, actor, camera, spacing) for name, camera in cameras.items()}
        finally:
            plotter.close()


def _image(plotter: Any, actor: Any, camera: Camera, spacing: float) -> np.ndarray:
    distance = math.dist(camera.position, camera.target)
    pixels = spacing / distance * SIZE / 2 / math.tan(math.radians(camera.view_angle / 2))  # between neighboring points
    actor.prop.point_size = max(2, math.ceil(1.5 * pixels))
    eye = plotter.camera
    eye.position, eye.focal_point, eye.up, eye.view_angle = camera.position, camera.target, camera.up, camera.view_angle
    eye.clipping_range = (0.01, 10.0)
    plotter.render()  # a screenshot alone shows the camera before
    return np.ascontiguousarray(plotter.screenshot(return_img=True, transparent_background=False)[..., :3])


def _prefer_egl_without_x() -> None:
    """VTK asks X for a display first, and crashes without X's libraries: then EGL is asked for, and after it OSMesa."""
    if sys.platform == "linux" and not (_loads("libX11.so.6") and _loads("libXcursor.so.1")):
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")


def _require_opengl(window: str) -> None:
    """VTK ends the process when it falls back to OSMesa and that is not there; this is asked before it draws."""
    if window != "vtkOSOpenGLRenderWindow" or any(map(_loads, ("libOSMesa.so", "libOSMesa.so.8", "libOSMesa.so.6"))):
        return
    raise UserError(
        "there is no OpenGL to render point clouds with: neither a display nor EGL nor OSMesa can be used; install "
        "one, e.g. apt-get install libegl1 libgl1-mesa-dri, or libosmesa6"
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
