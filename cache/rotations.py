"""Rotation forms ↔ 6D: the first two columns of the rotation matrix (Zhou et al. 2019, arXiv:1812.07035), in float64.

Conventions: quaternions are (x, y, z, w); Euler "xyz" are angles about the fixed x, then y, then z axis, R = Rz·Ry·Rx
(scipy's lower-case "xyz"); an axis-angle is the unit axis times the angle in radians. 6D is
(r00, r10, r20, r01, r11, r21).
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError

WIDTH = {"quat_xyzw": 4, "euler_xyz": 3, "axis_angle": 3, "rot6d": 6}  # native width of each form


def to_rot6d(form: str, values: np.ndarray) -> np.ndarray:
    """`values [..., WIDTH[form]]` → 6D [..., 6]. Quaternions of any length but 0 are accepted (`UserError` for 0)."""
    values = np.asarray(values, dtype=np.float64)
    if form == "rot6d":
        return values
    if form == "euler_xyz":
        matrix = _from_euler(values)
    else:
        matrix = _from_quaternion(_quaternion_from_axis_angle(values) if form == "axis_angle" else _unit(values))
    return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def from_rot6d(form: str, values: np.ndarray) -> np.ndarray:
    """6D `values [..., 6]` (made orthonormal first) → `form` [..., WIDTH[form]].

    Canonical results: quaternions have w ≥ 0; axis-angles have length ≤ π; Euler pitch is in [-π/2, π/2].
    """
    matrix = matrix_from_rot6d(values)
    if form == "rot6d":
        return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)
    if form == "euler_xyz":
        return _to_euler(matrix)
    quaternion = _to_quaternion(matrix)
    return _axis_angle_from_quaternion(quaternion) if form == "axis_angle" else quaternion


def matrix_from_rot6d(values: np.ndarray) -> np.ndarray:
    """6D [..., 6] → rotation matrix [..., 3, 3] by Gram-Schmidt. Degenerate input (a zero or parallel column) gives a
    valid rotation whose free directions are chosen from the coordinate axes."""
    values = np.asarray(values, dtype=np.float64)
    first = _normalise(values[..., :3], np.array([1.0, 0.0, 0.0]))
    second = values[..., 3:] - (first * values[..., 3:]).sum(-1, keepdims=True) * first
    axis = np.eye(3)[np.abs(first).argmin(-1)]  # the coordinate axis least aligned with the first column
    spare = axis - (first * axis).sum(-1, keepdims=True) * first
    second = _normalise(second, spare / np.linalg.norm(spare, axis=-1, keepdims=True))
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _normalise(vector: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.where(length > 1e-8, vector / np.maximum(length, 1e-8), fallback)


def _unit(quaternion: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if (length < 1e-6).any():
        raise UserError("a quaternion of length 0 is not a rotation; check the field map and the data")
    return quaternion / length


def _from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    x, y, z, w = np.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _to_quaternion(m: np.ndarray) -> np.ndarray:
    """Shepperd's method: divide by the largest of the four components, so that no rotation loses precision."""
    trace = np.trace(m, axis1=-2, axis2=-1)
    d0, d1, d2 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1], m[..., 0, 2], m[..., 1, 0]
    at, bt, ct = m[..., 1, 2], m[..., 2, 0], m[..., 0, 1]
    candidates = np.stack([  # each row is 4 · (component) · (x, y, z, w)
        np.stack([1 + d0 - d1 - d2, c + ct, b + bt, a - at], axis=-1),
        np.stack([c + ct, 1 - d0 + d1 - d2, a + at, b - bt], axis=-1),
        np.stack([b + bt, a + at, 1 - d0 - d1 + d2, c - ct], axis=-1),
        np.stack([a - at, b - bt, c - ct, 1 + trace], axis=-1),
    ], axis=-2)  # [..., 4, 4]
    best = np.stack([d0, d1, d2, trace], axis=-1).argmax(-1)[..., None, None]
    quaternion = np.take_along_axis(candidates, best, axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def _quaternion_from_axis_angle(vector: np.ndarray) -> np.ndarray:
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    return np.concatenate([0.5 * np.sinc(half / np.pi) * vector, np.cos(half)], axis=-1)  # sin(h)·v/|v| = ½·sinc(h)·v


def _axis_angle_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    sine = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)
    half = np.arctan2(sine, quaternion[..., 3:])
    return quaternion[..., :3] * 2 / np.sinc(half / np.pi)  # angle / sin(half) = 2 / sinc(half)


def _from_euler(angles: np.ndarray) -> np.ndarray:
    (cr, cp, cy), (sr, sp, sy) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _to_euler(m: np.ndarray) -> np.ndarray:
    cosine = np.hypot(m[..., 0, 0], m[..., 1, 0])
    pitch = np.arctan2(-m[..., 2, 0], cosine)
    locked = cosine < 1e-6  # gimbal lock: only roll ∓ yaw is defined; yaw = 0 is chosen
    roll = np.where(locked, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    yaw = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([roll, pitch, yaw], axis=-1)
