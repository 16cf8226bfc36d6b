"""torch.compile for the blocks of a policy network."""

from __future__ import annotations

import os
import shutil

from ...drifting.policy_net import PolicyNet
from ...errors import UserError


def compile_blocks(net: PolicyNet) -> None:
    """`torch.compile` every transformer block in place: one compilation serves all, and parameters keep their names."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise UserError(
            "install a C++ compiler (g++ or clang++; on Debian: apt install g++), which compile needs, or leave it out"
        )
    for block in net.dit.blocks:
        block.compile()
