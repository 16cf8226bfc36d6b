"""torch.compile for the blocks of a policy network."""

from __future__ import annotations

import os
import shutil

from ...drifting.policy_net import PolicyNet
from ...errors import UserError


def missing_compiler(device: str) -> str:
    """What to install before torch can compile for a type of device; "": nothing."""
    if device == "cuda":  # Triton builds launchers in C
        what, found, names = "C", os.environ.get("CC", "gcc"), ("cc", "clang")
    else:
        what, found, names = "C++", os.environ.get("CXX", "g++"), ("c++", "clang++")
    usual = names[-1].replace("clang", "g" if what == "C++" else "gcc")
    there = any(shutil.which(name) for name in (found, *names))
    return "" if there else f"install a {what} compiler ({usual} or {names[-1]}; on Debian: apt install {usual})"


def compile_blocks(net: PolicyNet) -> None:
    """`torch.compile` every transformer block in place: one compilation serves all, and parameters keep their names."""
    if remedy := missing_compiler(next(net.parameters()).device.type):
        raise UserError(f"{remedy}, which compile needs, or leave it out (--set compile=false)")
    for block in net.dit.blocks:
        block.compile()
