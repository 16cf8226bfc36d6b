"""Settings of `dvla data add`, as the command line gives them. Imports no reader: its help is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...common.config import Option


@dataclass(frozen=True)
class AddConfig:
    """What the files do not say of a dataset; None: not given."""

    out: Annotated[
        Path | None,
        Option("--out", help="YAML file to write; default: registered, in ~/.config/dvla/datasets/NAME.yaml."),
    ] = None
    yes: Annotated[bool, Option("--yes", help="Take every proposal without asking.")] = False
    name: Annotated[str | None, Option("--name", help="Family name; default: the dataset's own.")] = None
    license: Annotated[str, Option("--license", help="Dataset license.")] = ""
    action_column: Annotated[
        tuple[str, ...] | None,
        Option("--action-column", help="Column of the action; several are concatenated. Default: those called action."),
    ] = None
    state_column: Annotated[
        tuple[str, ...] | None,
        Option("--state-column", help="Column of the state. Default: observation.state, or what is like it."),
    ] = None
    field: Annotated[
        tuple[str, ...],
        Option(
            "--field",
            help="Meaning of dimensions whose names do not say it: action.6=gripper_open, "
            "'state.0-5=arm_joint_{0..5}_pos', action.3-6=rotation:quat_xyzw, action.7=drop. "
            "May be given several times.",
        ),
    ] = ()
    embodiment: Annotated[
        str | None, Option("--embodiment", help="Embodiment, e.g. gripper_joint, gripper_delta_eef or bimanual.")
    ] = None
    action_kind: Annotated[
        str | None,
        Option("--action-kind", help="Kind of action: absolute targets, delta (displacement per step) or velocity."),
    ] = None
    joint_unit: Annotated[
        str | None,
        Option("--joint-unit", help="Unit of joints: rad, deg, percent (of the range, ±100) or radians per unit."),
    ] = None
    finger_unit: Annotated[
        str | None,
        Option(
            "--finger-unit", help="Unit of finger joints: rad, deg, percent or radians per unit; 1: normalized values."
        ),
    ] = None
    position_unit: Annotated[
        str | None, Option("--position-unit", help="Unit of positions: m, cm, mm or meters per unit.")
    ] = None
    delta_scale: Annotated[
        str | None,
        Option("--delta-scale", help="METERS,RADIANS that 1 in the end effector's displacement or velocity means."),
    ] = None
    base_unit: Annotated[
        str | None, Option("--base-unit", help="LENGTH,ANGLE units of the base's velocity, e.g. m,deg.")
    ] = None
    gripper: Annotated[
        str | None,
        Option("--gripper", help="OPEN,CLOSED: the gripper's value when open and when closed, e.g. 1,0 or 0,100."),
    ] = None
    state_gripper: Annotated[
        str | None, Option("--state-gripper", help="OPEN,CLOSED of the state, where it differs from the action.")
    ] = None
    rotation: Annotated[
        str | None,
        Option("--rotation", help="Form of three rotation numbers in radians: euler_xyz or axis_angle."),
    ] = None
    control_hz: Annotated[
        str | None, Option("--control-hz", help="Rows per second, where the files do not give it.")
    ] = None
