"""zarr-python, tensorstore and xarray open a cache of every kind and read the same numbers as our reader."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.store.cache import Cache
from dvla.cache.store.codec import dequantize
from dvla.cache.store.dataset import CacheDataset
from dvla.cache.store.feature_format import FeatureFormat
from dvla.cache.store.plan import array_name
from support import synthetic_cache as synthetic

FORMATS = [
    FeatureFormat(dtype, compression)
    for dtype in ("float16", "int8", "float8_e4m3fn")
    for compression in ("none", "zstd", "lz4")
]
TABLES = pytest.mark.parametrize("cache", FORMATS[3:4], indirect=True, ids=["int8"])  # tables are stored alike in all
Array = Any  # of the library: indexed like numpy


@pytest.fixture(scope="module", params=FORMATS, ids=lambda f: f"{f.dtype}-{f.compression}")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two datasets, every 2nd frame, one augmented variant; the last shard of each array is not full."""
    path = tmp_path_factory.mktemp("interop") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        synthetic.build(path, plan=synthetic.make_plan(format=request.param, frame_stride=2, variants=1))
    return Cache.open(path)


def zarr_python(path: Path) -> Callable[[str], Array]:
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the metadata is outside the specification
        root = zarr.open_consolidated(str(path))
        assert {name for name, _ in root.members(max_depth=None)} == {
            p.parent.relative_to(path).as_posix() for p in path.rglob("zarr.json")
        } - {"."}
    return lambda name: root[name]


def tensorstore(path: Path) -> Callable[[str], Array]:
    library = pytest.importorskip("tensorstore")

    class Read:
        def __init__(self, name: str) -> None:
            self._array = library.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}, read=True
            ).result()
            self.shape, self.dtype = self._array.shape, self._array.dtype.numpy_dtype

        def __getitem__(self, where: Any) -> np.ndarray:
            return np.asarray(self._array[where].read().result())

    return Read


def xarray(path: Path) -> Callable[[str], Array]:
    library = pytest.importorskip("xarray")

    def open_array(name: str) -> Array:
        group, _, variable = name.rpartition("/")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dataset = library.open_zarr(str(path), group=group or None, consolidated=True, chunks=None)
        return dataset[variable]

    return open_array


LIBRARIES = {"zarr": zarr_python, "tensorstore": tensorstore, "xarray": xarray}


@pytest.fixture(params=LIBRARIES)
def opened(request: pytest.FixtureRequest, cache: Cache) -> Callable[[str], Array]:
    return LIBRARIES[request.param](cache.path)


def arrays(dataset: CacheDataset) -> Iterator[tuple[str, int, str]]:
    for view, variant in itertools.product(dataset.views, range(dataset.variants + 1)):
        yield view, variant, array_name(view, variant)


def test_features_and_scales(cache: Cache, opened: Callable[[str], Array]) -> None:
    for d in cache.datasets:
        rows = d.frame_of(np.arange(d.observations))
        for view, variant, name in arrays(d):
            codes, scale = d.records(view, rows, variant)
            found = [(opened(f"{d.name}/features/{name}"), codes)]
            if scale is not None:
                found.append((opened(f"{d.name}/scales/{name}"), scale))
            for array, expected in found:
                assert tuple(array.shape) == expected.shape and np.dtype(array.dtype) == expected.dtype
                np.testing.assert_array_equal(np.asarray(array[:]), expected)
                np.testing.assert_array_equal(np.asarray(array[5:18, 1]), expected[5:18, 1])  # across a shard's end
                np.testing.assert_array_equal(np.asarray(array[::7]), expected[::7])
                for i in (0, 15, 16, len(expected) - 1):
                    np.testing.assert_array_equal(np.asarray(array[i]), expected[i])


def test_decoding_with_what_they_read(cache: Cache, opened: Callable[[str], Array]) -> None:
    """features = codes · scales · channel_scale, from their arrays alone, is `CacheDataset.features`."""
    d = cache.named("beta")
    rows = d.frame_of(np.arange(d.observations))
    codes = torch.from_numpy(np.array(opened("beta/features/top")[:]))
    if cache.format.quantized:
        scales, channels = (torch.from_numpy(np.array(opened(n)[:])) for n in ("beta/scales/top", "channel_scale"))
        np.testing.assert_array_equal(channels, synthetic.CHANNELS)
        codes = dequantize(codes, scales, channels, torch.float16)
    np.testing.assert_array_equal(codes.numpy(), d.features("top", rows))


@TABLES
def test_tables(cache: Cache, opened: Callable[[str], Array]) -> None:
    for d in cache.datasets:
        expected = {
            "action": d.action,
            "proprio": d.proprio,
            "timestamp": d.timestamp,
            "action_mask": d.action_mask,
            "proprio_mask": d.proprio_mask,
            "text/embedding": d.text,
            "text/length": d.text_length,
            "null_text": d.null_text,
            **{f"episodes/{n}": getattr(d, f"episode_{n}") for n in ("start", "length", "id", "instruction")},
            **{f"null/{view}": d.null_features[i] for i, view in enumerate(d.views)},
        }
        for name, values in expected.items():
            array = opened(f"{d.name}/{name}")
            assert np.dtype(array.dtype) == values.dtype
            np.testing.assert_array_equal(np.asarray(array[:]), values, err_msg=name)


def test_metadata_says_what_the_numbers_mean(cache: Cache) -> None:
    """float8 has no type in Zarr: its bytes are uint8, with an attribute. xarray sees dimensions and attributes."""
    library = pytest.importorskip("xarray")
    for d in cache.datasets:
        group = library.open_zarr(str(cache.path), group=d.name, consolidated=True, chunks=None)
        assert group.attrs["instructions"] == list(d.instructions) and group.attrs["control_hz"] == d.control_hz
        assert group["action"].dims == ("frame", "slot") and group.sizes["frame"] == d.frames
        features = library.open_zarr(str(cache.path), group=f"{d.name}/features", consolidated=True, chunks=None)
        assert features.sizes == {"observation": d.observations, "token": d.tokens, "channel": d.width}
        for _, _, name in arrays(d):
            assert features[name].attrs.get("encoding") == (
                "float8_e4m3fn" if cache.format.dtype == "float8_e4m3fn" else None
            )


@TABLES
def test_xarray_opens_the_whole_tree(cache: Cache) -> None:
    """One call opens every group; in a group xarray aligns equal dimension names, so no two sizes may share one."""
    library = pytest.importorskip("xarray")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = library.open_datatree(str(cache.path), engine="zarr", consolidated=True, chunks=None)
    for d in cache.datasets:
        np.testing.assert_array_equal(tree[f"{d.name}/action"].values, d.action)
        for view, variant, name in arrays(d):
            np.testing.assert_array_equal(
                tree[f"{d.name}/features/{name}"][3].values, d.records(view, d.frame_of(np.array([3])), variant)[0][0]
            )
