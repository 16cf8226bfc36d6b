"""torch.compile for the blocks of a policy network."""

from __future__ import annotations

import os
import shutil

from ...drifting.policy_net import PolicyNet
from ...errors import UserError


def compile_blocks(net: PolicyNet) -> None:
    """`torch.compile` every transformer block in place: one compilation serves all, and parameters keep their names."""
    if next(net.parameters()).device.type == "cuda":  # Triton builds launchers in C
        what, found, names = "C", os.environ.get("CC", "gcc"), ("cc", "clang")
    else:
        what, found, names = "C++", os.environ.get("CXX", "g++"), ("c++", "clang++")
    if not any(shutil.which(name) for name in (found, *names)):
        usual = names[-1].replace("clang", "g" if what == "C++" else "gcc")
        raise UserError(
            f"install a {what} compiler ({usual} or {names[-1]}; on Debian: apt install {usual}), which compile needs, "
            "or leave it out"
        )
    for block in net.dit.blocks:
        block.compile()
