"""Parts of an HDF5 file over which libhdf5 loops or dies cost themselves: they are tried in another process."""

import os
import time

import h5py
import numpy as np
import pytest

from dvla.cache.readers import hdf5_child, open_source
from dvla.errors import Failed, UserError
from support.hdf5_samples import write_robomimic

DIES = """
import os, sys
print("ready", flush=True)
for line in sys.stdin:
    if "demo_" in line and any(f"demo_{n}\\"" in line for n in %r):
        os._exit(1)
    print("done", flush=True)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`child(numbers)`: from now on a process that dies over the demos of these numbers."""

    def replace(numbers):
        script = tmp_path / f"child_{len(numbers)}.py"
        script.write_text(DIES % (numbers,))
        monkeypatch.setattr(hdf5_child.hdf5_probe, "__file__", str(script))
        monkeypatch.setattr(hdf5_child, "_child", None)

    yield replace
    hdf5_child._child.stop()


def outcome(path):
    source = open_source(path)
    found = {e: source.attempt(source.load, e) for e in source.episode_ids}
    return {e for e, f in found.items() if isinstance(f, Failed)}, found


def test_a_group_over_which_it_dies_costs_its_episode(demos, child):
    whole = outcome(demos)
    assert not whole[0]
    child([2])
    lost, found = outcome(demos)
    assert lost == {2} and found[2].kind == "unreadable-file"
    assert found[2].reason.startswith("'data/demo_2' of image.hdf5 is damaged: reading it does not end")
    assert found[0].source_hash == whole[1][0].source_hash


def test_a_file_that_ends_it_three_times_is_given_up(demos, child):
    child(range(20))
    with pytest.raises(UserError, match="none of its .* demos can be used|is damaged"):
        open_source(demos)
    assert max(hdf5_child._child.deaths.values()) == 3


def test_a_file_is_tried_once_for_each_of_its_states(demos, monkeypatch):
    monkeypatch.setattr(hdf5_child, "_child", None)
    assert hdf5_child.can_be_read(demos)
    child = hdf5_child._child
    monkeypatch.setattr(child, "_answers", lambda *_: False)
    assert hdf5_child.can_be_read(demos) and not hdf5_child.can_be_read(demos, "data/demo_0", True)
    os.utime(demos, ns=(1, 1))
    assert not hdf5_child.can_be_read(demos)
    child.stop()


def test_files_are_read_where_no_process_can_be_started(demos, monkeypatch):
    monkeypatch.setattr(hdf5_child, "_child", None)
    monkeypatch.setattr(hdf5_child.sys, "executable", "/nowhere/python")
    assert not outcome(demos)[0]


def test_a_forked_process_asks_one_of_its_own(demos):
    assert hdf5_child.can_be_read(demos)
    pid = os.fork()
    if not pid:
        os._exit(0 if hdf5_child._child is None and hdf5_child.can_be_read(demos) else 1)
    assert os.waitpid(pid, 0)[1] == 0 and hdf5_child.can_be_read(demos, "data")


def test_damage_anywhere_of_the_heaps_ends(tmp_path):
    """Bytes of the tables of groups and attributes overwritten: as `fuzz_readers.py` found a loop."""
    path = write_robomimic(tmp_path / "can.hdf5")
    data, begun = path.read_bytes(), time.monotonic()
    places = [i for sign in (b"FRHP", b"GCOL", b"HEAP") if (i := data.find(sign)) >= 0]
    with h5py.File(path) as file:
        assert places and file["data"].attrs["env_args"]
    rng = np.random.default_rng(0)
    for place in places * 2:
        at = place + int(rng.integers(4, 200))
        path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        try:
            outcome(path)
        except UserError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - begun < 120
