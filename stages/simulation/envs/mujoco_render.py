"""MuJoCo rendering without a display, and its instability check, for the simulators built on it.

Letters: S image size in pixels.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from ....errors import UserError

HIDDEN_GROUP = 5  # MuJoCo geom group that is never rendered
MAX_RENDERERS = 4  # GL contexts kept open in one process


def choose_gl_backend() -> str | None:
    """Set MUJOCO_GL and PYOPENGL_PLATFORM for rendering without a display, before mujoco is first imported.

    The user's own choice is kept. Otherwise off-screen Mesa if libOSMesa is found, else EGL, else no rendering (use
    without images still works). Returns the backend in force, None where MuJoCo's own default applies.
    """
    if "MUJOCO_GL" not in os.environ and sys.platform.startswith("linux") and "mujoco" not in sys.modules:
        found = (name for name, library in (("osmesa", "OSMesa"), ("egl", "EGL")) if ctypes.util.find_library(library))
        os.environ["MUJOCO_GL"] = next(found, "disable")
    backend = os.environ.get("MUJOCO_GL")
    if backend in ("osmesa", "egl"):
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    return backend


def load_mujoco() -> Any:
    """The module `mujoco`, set up for rendering without a display.

    `UserError` with the install step if it does not load.
    """
    choose_gl_backend()
    try:
        import mujoco
    except (ImportError, AttributeError) as error:  # PyOpenGL raises AttributeError when the chosen library is absent
        raise UserError(
            f"mujoco cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; "
            "install libosmesa6 (or libegl1) or unset MUJOCO_GL"
        ) from error
    return mujoco


def unstable(data: Any) -> bool:
    """Whether the simulation diverged and was reset by MuJoCo: the episode cannot be solved anymore."""
    kinds = load_mujoco().mjtWarning
    return any(data.warning[kind].number for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC))


class Renderer:
    """One GL context and scene; renders any instance of its task (they share meshes and textures)."""

    def __init__(self, model: Any, size: int) -> None:
        self._mujoco = load_mujoco()
        if not hasattr(self._mujoco, "GLContext"):
            raise UserError("no headless OpenGL library was found for rendering; install libosmesa6 or libegl1")
        # Shadows, reflections and multisampling take five sixths of the time of a software renderer.
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            _initialize_display()
            self._gl = self._mujoco.GLContext(size, size)
            self._gl.make_current()
            self._context = self._mujoco.MjrContext(model, self._mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:  # whatever the GL binding in use raises
            raise UserError(
                f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; "
                "install libosmesa6 or libegl1, or set MUJOCO_GL to osmesa, egl or glfw"
            ) from error
        self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = self._mujoco.MjvScene(model, 1000)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._options, self._perturb = self._mujoco.MjvOption(), self._mujoco.MjvPerturb()
        self._options.geomgroup[HIDDEN_GROUP] = 0
        self._camera = self._mujoco.MjvCamera()
        self._camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        self._view = self._mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), np.uint8)

    def render(self, model: Any, data: Any, camera: str) -> np.ndarray:
        """uint8 `[S, S, 3]`, top row first; a view of a reused buffer."""
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        self._mujoco.mjv_updateScene(
            model, data, self._options, self._perturb, self._camera, self._mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._mujoco.mjr_render(self._view, self._scene, self._context)
        self._mujoco.mjr_readPixels(self._pixels, None, self._view, self._context)
        return self._pixels[::-1]

    def usable(self) -> bool:
        """Whether its context still exists: another library of the process may have shut EGL down."""
        try:
            self._gl.make_current()
        except Exception:  # whatever the GL binding in use raises
            return False
        return True

    def close(self) -> None:
        """Free the GL objects; left to the garbage collector, they would be freed in whatever context is current."""
        if self.usable():
            self._context.free()
            self._gl.free()
        else:
            self._gl._context = None  # it ended with its display: freeing it would raise
            _leave_context()  # in another context its object numbers name other objects
            self._context.free()


def _initialize_display() -> None:
    """Initialize EGL, which the whole process shares: another library (VTK does) may have shut the display down.

    Initializing it twice is allowed.
    """
    if os.environ.get("MUJOCO_GL") == "egl":
        from mujoco import egl

        if egl.EGL_DISPLAY is not None:
            egl.EGL.eglInitialize(egl.EGL_DISPLAY, None, None)


def _leave_context() -> None:
    """Make no EGL context current."""
    from mujoco import egl

    _initialize_display()
    egl.EGL.eglMakeCurrent(egl.EGL_DISPLAY, egl.EGL.EGL_NO_SURFACE, egl.EGL.EGL_NO_SURFACE, egl.EGL.EGL_NO_CONTEXT)


_renderers: dict[tuple[Hashable, int], Renderer] = {}  # the most recently used last


def renderer(task: Hashable, size: int, make_model: Callable[[], Any]) -> Renderer:
    """The renderer that environments of one task and size share in a process: a GL context costs 0.5 s and 50 MB.

    `make_model()` returns a model of the task, whose rendering quality is changed.
    """
    found = _renderers.pop((task, size), None)
    if found is not None and not found.usable():
        found.close()
        found = None
    if found is None:
        while len(_renderers) >= MAX_RENDERERS:
            _renderers.pop(next(iter(_renderers))).close()
        found = Renderer(make_model(), size)
        if not _renderers:
            # After the first context: MuJoCo's shutdown of EGL, registered with it, then runs later.
            atexit.register(_close_renderers)
    _renderers[task, size] = found
    return found


def _close_renderers() -> None:
    """At exit: GL contexts must be freed before the display is shut down and modules are torn down."""
    while _renderers:
        _renderers.popitem()[1].close()


@contextlib.contextmanager
def unseen_hidden(model: Any, data: Any, camera: str) -> Iterator[None]:
    """Hide geoms whose bounding sphere lies outside the camera's field of view.

    The image stays the same. MuJoCo would send their vertices (67 000 faces of robot) through a software renderer all
    the same, which takes most of the time for the camera in the hand.
    """
    index, groups = model.camera(camera).id, model.geom_group.copy()
    xyz = (data.geom_xpos - data.cam_xpos[index]) @ data.cam_xmat[index].reshape(3, 3)
    half, depth, radius = np.deg2rad(model.cam_fovy[index]) / 2, -xyz[:, 2], model.geom_rbound
    seen = depth >= -radius
    for axis in (0, 1):  # signed distance to the field's side planes
        seen &= np.abs(xyz[:, axis]) * np.cos(half) - depth * np.sin(half) <= radius
    seen |= radius == 0  # planes have no bound
    model.geom_group[:] = np.where(seen, groups, HIDDEN_GROUP)
    try:
        yield
    finally:
        model.geom_group[:] = groups
