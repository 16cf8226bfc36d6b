"""Rotation forms ↔ 6D: the first two columns of the rotation matrix (Zhou et al. 2019, arXiv:1812.07035), in float64.

Conventions: quaternions are (x, y, z, w); Euler "xyz" are angles about the fixed x, then y, then z axis, R = Rz·Ry·Rx
(scipy's lower-case "xyz"); an axis-angle is the unit axis times the angle in radians; a matrix is its nine numbers row
by row. 6D is (r00, r10, r20, r01, r11, r21).
"""

from __future__ import annotations

import numpy as np

from ...errors import UserError

WIDTH = {"quat_xyzw": 4, "euler_xyz": 3, "axis_angle": 3, "rot6d": 6, "matrix": 9}  # native width of each form
QUATERNION_LENGTH = 0.5, 2.0  # accepted, and made 1: interpolated or rounded ones are near 1, other columns are not
ORTHONORMAL = 0.01  # how far columns may be from orthonormal: float16 storage passes, a wrong column does not
_LIMITS = {
    "quat_xyzw": "a quaternion's length must be 0.5 to 2",
    "rot6d": "the two columns must be orthonormal to 0.01",
    "matrix": "its columns must be orthonormal to 0.01 and right-handed: no reflection, no zeros",
}


class NotARotation(UserError):
    """Not a valid rotation; the message names the first such row, its numbers and what is accepted."""


def require_rotations(form: str, values: np.ndarray) -> None:
    """`NotARotation` unless every row of `values [..., WIDTH[form]]` is a rotation, as any Euler angles are."""
    if form not in _LIMITS:
        return
    rows = np.asarray(values, dtype=np.float64).reshape(-1, WIDTH[form])
    if form == "quat_xyzw":
        length = np.linalg.norm(rows, axis=-1)
        good = (length >= QUATERNION_LENGTH[0]) & (length <= QUATERNION_LENGTH[1])
    else:
        columns = rows.reshape(-1, 2, 3) if form == "rot6d" else rows.reshape(-1, 3, 3).swapaxes(1, 2)  # [n, column, 3]
        error = np.abs(columns @ columns.swapaxes(1, 2) - np.eye(columns.shape[1])).max((1, 2))
        good = error <= ORTHONORMAL
        if form == "matrix":
            good &= np.linalg.det(columns) > 0
    if not good.all():
        row = int(good.argmin())
        numbers = ", ".join(f"{v:.4g}" for v in rows[row])
        raise NotARotation(
            f"row {row}: ({numbers}) is not a rotation as {form}; {_LIMITS[form]}, check the field map and the data"
        )


def to_rot6d(form: str, values: np.ndarray) -> np.ndarray:
    """`values [..., WIDTH[form]]` → 6D [..., 6]; `NotARotation` (a `UserError`) where they are not rotations."""
    values = np.asarray(values, dtype=np.float64)
    require_rotations(form, values)
    if form == "rot6d":
        return values
    if form == "matrix":
        given = values.reshape(*values.shape[:-1], 3, 3)
        matrix = matrix_from_rot6d(np.concatenate([given[..., :, 0], given[..., :, 1]], axis=-1))
    elif form == "euler_xyz":
        matrix = _from_euler(values)
    else:
        matrix = _from_quaternion(_quaternion_from_axis_angle(values) if form == "axis_angle" else _canonical(values))
    return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def from_rot6d(form: str, values: np.ndarray) -> np.ndarray:
    """6D `values [..., 6]` (made orthonormal first) → `form` [..., WIDTH[form]].

    Canonical results: quaternions have w ≥ 0; axis-angles have length ≤ π; Euler pitch is in [-π/2, π/2].
    """
    matrix = matrix_from_rot6d(values)
    if form == "rot6d":
        return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)
    if form == "matrix":
        return matrix.reshape(*matrix.shape[:-2], 9)
    if form == "euler_xyz":
        return _to_euler(matrix)
    quaternion = _to_quaternion(matrix)
    return _axis_angle_from_quaternion(quaternion) if form == "axis_angle" else quaternion


def to_quaternion(form: str, values: np.ndarray) -> np.ndarray:
    """`values [..., WIDTH[form]]` → unit quaternions xyzw [..., 4] with w ≥ 0; `NotARotation` where there is none."""
    values = np.asarray(values, dtype=np.float64)
    require_rotations(form, values)
    if form == "quat_xyzw":
        return _canonical(values)
    if form == "axis_angle":
        return _canonical(_quaternion_from_axis_angle(values))
    if form == "euler_xyz":
        half = np.eye(3) * values[..., None] / 2  # [..., axis, 3]: R = Rz·Ry·Rx, one turn per axis
        x, y, z = np.moveaxis(np.concatenate([np.sin(half), np.cos(values / 2)[..., None]], axis=-1), -2, 0)
        return _canonical(multiply(z, multiply(y, x)))
    return _to_quaternion(matrix_from_rot6d(to_rot6d(form, values)))


def from_quaternion(form: str, quaternion: np.ndarray) -> np.ndarray:
    """Quaternions xyzw [..., 4], made unit first (zeros: identity), → `form` [..., WIDTH[form]], as in `from_rot6d`."""
    quaternion = _canonical(np.asarray(quaternion, dtype=np.float64))
    if form == "quat_xyzw":
        return quaternion
    if form == "axis_angle":
        return _axis_angle_from_quaternion(quaternion)
    matrix = _from_quaternion(quaternion)
    return from_rot6d(form, np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1))


def _canonical(quaternion: np.ndarray) -> np.ndarray:
    unit = _normalize(quaternion, np.array([0.0, 0.0, 0.0, 1.0]))
    return np.where(unit[..., 3:] < 0, -unit, unit)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion product a·b, xyzw [..., 4]: the rotation that does b first, then a."""
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    return np.concatenate([aw * bv + bw * av + np.cross(av, bv), aw * bw - (av * bv).sum(-1, keepdims=True)], axis=-1)


def conjugate(quaternion: np.ndarray) -> np.ndarray:
    """The inverse of unit quaternions xyzw [..., 4]."""
    return quaternion * np.array([-1.0, -1.0, -1.0, 1.0])


def rotate(quaternion: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] turned by unit quaternions xyzw [..., 4]."""
    return (_from_quaternion(quaternion) @ vector[..., None])[..., 0]


def matrix_from_rot6d(values: np.ndarray) -> np.ndarray:
    """6D [..., 6] → rotation matrix [..., 3, 3] by Gram-Schmidt. Degenerate input (a zero or parallel column) gives a
    valid rotation whose free directions are chosen from the coordinate axes."""
    values = np.asarray(values, dtype=np.float64)
    first = _normalize(values[..., :3], np.array([1.0, 0.0, 0.0]))
    second = values[..., 3:] - (first * values[..., 3:]).sum(-1, keepdims=True) * first
    axis = np.eye(3)[np.abs(first).argmin(-1)]  # the coordinate axis least aligned with the first column
    spare = axis - (first * axis).sum(-1, keepdims=True) * first
    second = _normalize(second, spare / np.linalg.norm(spare, axis=-1, keepdims=True))
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _normalize(vector: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.where(length > 1e-8, vector / np.maximum(length, 1e-8), fallback)


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
    candidates = np.stack(
        [  # each row is 4 · (component) · (x, y, z, w)
            np.stack([1 + d0 - d1 - d2, c + ct, b + bt, a - at], axis=-1),
            np.stack([c + ct, 1 - d0 + d1 - d2, a + at, b - bt], axis=-1),
            np.stack([b + bt, a + at, 1 - d0 - d1 + d2, c - ct], axis=-1),
            np.stack([a - at, b - bt, c - ct, 1 + trace], axis=-1),
        ],
        axis=-2,
    )  # [..., 4, 4]
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
