"""What `--compile` needs of a machine."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from dvla.errors import UserError
from dvla.stages.policy.compile import compile_blocks


class Net:
    """Blocks on a device."""

    def __init__(self, device: str) -> None:
        self.compiled: list[str] = []
        self.dit: Any = SimpleNamespace(blocks=[SimpleNamespace(compile=lambda: self.compiled.append(device))])
        self._weight = SimpleNamespace(device=SimpleNamespace(type=device))

    def parameters(self) -> Any:
        return iter([self._weight])


@pytest.mark.parametrize(
    "device, there, needed", [("cuda", "gcc", "gcc"), ("cuda", "g++", "C compiler"), ("cpu", "gcc", "C++ compiler")]
)
def test_the_compiler_that_the_device_needs(
    monkeypatch: pytest.MonkeyPatch, device: str, there: str, needed: str
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == there else None)
    net: Any = Net(device)
    if needed == there:
        compile_blocks(net)
        assert net.compiled == [device]
        return
    with pytest.raises(UserError, match=f"install a {needed[:-9]} compiler".replace("+", r"\+")):
        compile_blocks(net)
