"""A safetensors file is judged by its header before a tensor is loaded, and its values are finite."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dvla.common.tensors import open_tensors, require_tensors
from dvla.errors import UserError


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def read(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        require_tensors(file.header, expected, path, "its weights")
        return file.load(file.header)


OWN = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


def test_what_fits_is_loaded(tmp_path: Path) -> None:
    found = read(written(tmp_path / "x.safetensors", OWN), OWN)
    assert all(torch.equal(found[name], OWN[name]) for name in OWN) and len(found) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "a is missing"),
        ({"c": torch.ones(1)}, "'c' belongs to no part of it"),
        ({"a": torch.ones(3, 2)}, r"a is float32 \[3, 2\], expected float32 \[2, 3\]"),
        ({"a": torch.ones(2, 3).half()}, r"a is float16 \[2, 3\], expected float32"),
        ({"b": torch.ones(2)}, r"b is float32 \[2\], expected int64"),
        ({"a": torch.full((2, 3), torch.nan)}, "'a' is not finite"),
        ({"a": torch.tensor([[0, 0, 0], [0, 0, torch.inf]])}, "'a' is not finite"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], said: str) -> None:
    tensors = {name: tensor for name, tensor in (OWN | change).items() if tensor is not None}
    with pytest.raises(UserError, match=said):
        read(written(tmp_path / "x.safetensors", tensors), OWN)


def test_nothing_is_loaded_of_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvla.common.tensors.TensorFile.load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="a is missing"):
        read(written(tmp_path / "x.safetensors", {"b": OWN["b"]}), OWN)


def header(path: Path, text: str, length: int | None = None) -> None:
    data = text.encode()
    path.write_bytes((len(data) if length is None else length).to_bytes(8, "little") + data + bytes(24))


def test_what_is_no_such_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    huge = {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 24]}}
    odd = {"a": {"dtype": "F8_E4M3", "shape": [24], "data_offsets": [0, 24]}}
    damages = {
        "nothing": path.touch,
        "noise": lambda: path.write_bytes(b"\x99" * 100),
        "a header too long": lambda: header(path, "{}", 2**62),
        "a huge shape": lambda: header(path, json.dumps(huge)),
        "another type": lambda: header(path, json.dumps(odd)),
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to itself": lambda: path.symlink_to(path.name),
        "an endless file": lambda: path.symlink_to("/dev/zero"),
    }
    for what, damage in damages.items():
        damage()
        with pytest.raises(UserError) as error:
            read(path, OWN)
        text = str(error.value)
        assert str(path) in text and "\n" not in text and len(text.replace(str(path), "")) < 200, what
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
