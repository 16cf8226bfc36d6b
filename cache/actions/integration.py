"""End-effector displacements per step → absolute poses, for datasets that store only the former. Pure, in float64.

Pose t is where the end effector should be after step t: the initial pose with deltas 0 … t applied one by one. With q
the rotation before a step, (d, r) the delta and ⊗ the quaternion product:

    frame   position        rotation
    world   p + d           r ⊗ q       axes of the world (Bridge V2, DROID, CALVIN and TACO's rel_actions_world)
    body    p + q d q⁻¹     q ⊗ r       axes of the end effector itself (UMI)
    mixed   p + d           q ⊗ r       the formula of research plan v2, section 4.2, step 2

Drift: commands are integrated. Where a controller lags, stops at contact or clips, the true pose falls behind; errors
add up over the episode, and differences of Euler angles are a rotation only to first order. Where the files hold
measured poses, reading those ahead (`action_shift`) has no drift. Letters: T steps, r width of the rotation form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import UserError
from .rotations import WIDTH, multiply, rotate, to_quaternion

Form = Literal["axis_angle", "quat_xyzw", "euler_xyz"]
Frame = Literal["world", "body", "mixed"]
POSE = 7  # x y z, then the quaternion x y z w


def integrate(
    initial_pose: np.ndarray, deltas: np.ndarray, rotation: Form = "axis_angle", frame: Frame = "world"
) -> np.ndarray:
    """`initial_pose [7]` (m, quaternion xyzw) and `deltas [T, 3+r]` (m per step, then the rotation per step in
    `rotation`) → poses [T, 7] float64, unit quaternions without sign flips. `NotARotation` for a zero quaternion."""
    deltas, start = np.asarray(deltas, dtype=np.float64), np.asarray(initial_pose, dtype=np.float64)
    turns = [to_quaternion("quat_xyzw", start[None, 3:]), to_quaternion(rotation, deltas[:, 3:])]
    q = np.concatenate(turns)  # [T+1, 4]
    step = 1
    while step < len(q):  # all products of the first t turns, by doubling: as exact as one by one, and much faster
        q[step:] = multiply(q[step:], q[:-step]) if frame == "world" else multiply(q[:-step], q[step:])
        step *= 2
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    q[1:] *= np.cumprod(np.where((q[1:] * q[:-1]).sum(-1) < 0, -1.0, 1.0))[:, None]
    moves = rotate(q[:-1], deltas[:, :3]) if frame == "body" else deltas[:, :3]
    return np.concatenate([start[:3] + np.cumsum(moves, axis=0), q[1:]], axis=-1)


@dataclass(frozen=True)
class Integration:
    """The option `integrate` of a dataset config: its action begins with a displacement of the hand, to be made
    absolute.

    The first 3 + r numbers of the action become x y z and a quaternion xyzw; the field map describes the result.
    """

    rotation: Form  # form of the rotation per step
    frame: Frame = "world"  # see above
    position_scale: float = 1.0  # meters per stored unit
    rotation_scale: float = 1.0  # radians per stored unit; 1 for quaternions

    def __post_init__(self) -> None:
        if not (
            np.isfinite([self.position_scale, self.rotation_scale]).all()
            and self.position_scale
            and self.rotation_scale
        ):
            raise UserError(
                f"integrate: position_scale {self.position_scale} and rotation_scale {self.rotation_scale} must be "
                "finite and not 0"
            )
        if self.rotation == "quat_xyzw" and self.rotation_scale != 1:
            raise UserError(
                f"integrate: rotation_scale {self.rotation_scale} does not apply to quaternions; leave it out"
            )

    @property
    def width(self) -> int:
        """Numbers of the stored action that become a pose: 3 + r."""
        return 3 + WIDTH[self.rotation]

    def apply(self, initial_pose: np.ndarray, action: np.ndarray) -> np.ndarray:
        """`initial_pose [7]`, stored `action [T, 3+r+n]` → [T, 7+n] float64; `NotARotation` for a zero quaternion."""
        scale = np.array([self.position_scale] * 3 + [self.rotation_scale] * (self.width - 3))
        poses = integrate(initial_pose, action[:, : self.width] * scale, self.rotation, self.frame)
        return np.concatenate([poses, action[:, self.width :]], axis=1)
