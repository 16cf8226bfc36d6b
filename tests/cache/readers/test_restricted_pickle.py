"""Pickles of strangers: the good ones read as Python reads them, all others are refused in one line and do nothing."""

import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.rlbench import unpickle as restricted_pickle
from dvla.cache.readers.rlbench.pickled_values import PickledArray, Record
from dvla.cache.readers.rlbench.unpickle import MAX_BYTES, load_records
from support.rlbench_samples import Demo, Observation, as_numpy1, dump, observations

PROTOCOLS = (2, 3, 4, 5)


def load(data):
    return load_records(data, "low_dim_obs.pkl", "rlbench episode 3")


def refused(data, message="refused$|damaged"):
    with pytest.raises(CorruptEpisode, match=message) as caught:
        load(data)
    assert str(caught.value).startswith("rlbench episode 3: low_dim_obs.pkl ") and "\n" not in str(caught.value)


def plain(value):
    """What was loaded as ordinary Python values."""
    if isinstance(value, Record):
        return value.kind, plain(value.fields)
    if isinstance(value, PickledArray):
        return value.numpy()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def equal(ours, theirs):
    if isinstance(theirs, np.ndarray):
        return isinstance(ours, np.ndarray) and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(theirs, (Demo, Observation)):
        return isinstance(ours, tuple) and ours[0] == type(theirs).__name__ and equal(ours[1], vars(theirs))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], v) for k, v in theirs.items())
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


# --- good pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("numpy", [1, 2])
def test_a_demo_reads_as_it_was(protocol, numpy):
    demo = Demo(observations(3, seed=0))
    data = dump(demo, protocol)
    assert b"numpy._core." in data
    data = as_numpy1(data) if numpy == 1 else data
    assert (b"numpy.core." in data, b"numpy._core." in data) == (numpy == 1, numpy == 2)
    assert equal(plain(load(data)), demo)
    assert "rlbench" not in sys.modules  # nothing was imported, and nothing had to be


ARRAYS = {
    t: np.arange(6).astype(t).reshape(2, 3) for t in ("f2", "f4", "f8", ">f8", "i1", "i2", ">i4", "i8", "u1", "u8", "?")
}
ARRAYS |= {
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 7)),
    "strided": np.arange(12.0)[::2],
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_numbers_of_numpy(protocol):
    values = {**ARRAYS, "again": ARRAYS["f8"]}
    for data in (pickle.dumps(values, protocol), as_numpy1(pickle.dumps(values, protocol))):
        assert equal(plain(load(data)), values)
    numbers = [np.float64(1.5), np.float32(0.25), np.int64(-7), np.bool_(True)]
    assert plain(load(pickle.dumps(numbers, protocol))) == [1.5, 0.25, -7, True]
    closed = plain(load(pickle.dumps([np.array(["text"]), np.array([1, None, []], object)], protocol)))
    assert closed == [None, None]  # text and objects are kept closed


simple = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
nested = st.recursive(
    simple,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=40,
)


@settings(max_examples=150, deadline=None)
@given(nested, st.sampled_from(PROTOCOLS))
def test_plain_values_read_as_python_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert equal(plain(load(data)), pickle.loads(data))


def test_long_values_shared_values_and_ordered_dicts():
    from collections import OrderedDict

    shared = ["x" * 300, b"y" * 300, bytes(70_000), "z" * 70_000]
    value = [shared, shared, list(range(3000)), {str(i): i for i in range(3000)}, OrderedDict(a=1, b=[2])]
    for protocol in PROTOCOLS:
        assert plain(load(pickle.dumps(value, protocol))) == [*value[:4], {"a": 1, "b": [2]}]
        assert load(pickle.dumps(bytearray(b"\x00\xff"), protocol)) == b"\x00\xff"


# --- pickles that want something else ------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.how = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.how


def named(module, name, *arguments, tail=b"R."):
    """Protocol 4: find `module.name` and call it with texts, without asking whether there is such a thing."""
    texts = [b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name, *arguments)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93(" + b"".join(texts[2:]) + b"t" + tail


GADGETS = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("builtins", "object"),
    ("rlbench.demo", "Demo.__init__.__globals__"),
    ("rlbench.demo", "__builtins__"),
    ("rlbench.backend.observation", "np"),
    ("builtins", "type"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy", "memmap"),
    ("numpy", "ndarray.tofile"),
    ("numpy.lib.npyio", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.f2py.crackfortran", "myeval"),
    ("numpy", "frombuffer"),
    ("numpy._core.multiarray", "fromfile"),
    ("numpy._core.numeric", "_frombuffer.__globals__"),
    ("_codecs", "decode"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("types", "FunctionType"),
    ("pickle", "loads"),
    ("copyreg", "_reconstructor"),
    ("collections", "defaultdict"),
    ("shutil", "rmtree"),
    ("pathlib", "PosixPath"),
]


@pytest.mark.parametrize("gadget", GADGETS, ids=".".join)
def test_no_other_name_can_be_asked_for(gadget):
    message = f"asks for {gadget[0]}.{gadget[1]}, which is not an observation record; refused"
    refused(named(*gadget, "x"), message)
    refused(b"\x80\x02c" + f"{gadget[0]}\n{gadget[1]}\n.".encode(), message)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_does_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    hidden = Observation()
    hidden.gripper_pose, hidden.misc = np.zeros(7), {"deep": [Call(os.system, f"touch {marker}")]}
    attacks = [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
        Call(subprocess.run, ["touch", str(marker)]),
        Demo([hidden]),
        Call(np.load, str(marker)),
        np.array([Call(os.mkdir, str(marker))], object),
    ]
    for attack in attacks:
        refused(dump(attack, protocol), "asks for .*, which is not an observation record; refused|asks for .*; refused")
        assert not marker.exists()
    pickle.loads(dump(Call(os.mkdir, str(marker)), protocol))  # Python's own would have done it
    assert marker.exists()


def forged():
    """State that numpy takes as it is, and that turns bytes into pointers."""
    multiarray = np._core.multiarray
    compound = Call(np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))

    def array(dtype, shape, raw, kind=np.ndarray):
        return Call(multiarray._reconstruct, kind, (0,), b"b", state=(1, shape, dtype, False, raw))

    plain_dtype = np.dtype("f8")
    return {
        "a field of objects over bytes": array(compound, (1,), b"A" * 8),
        "objects over bytes": array(np.dtype("O"), (1,), b"A" * 8),
        "fewer bytes than the shape": array(plain_dtype, (1000,), b"A" * 8),
        "a shape of billions": array(plain_dtype, (10**9, 10**9), b""),
        "a negative shape": array(plain_dtype, (-1, -8), b"A" * 64),
        "a shape that is no tuple": array(plain_dtype, "x", b"A" * 8),
        "another class of array": array(plain_dtype, (1,), b"A" * 8, kind=Observation),
        "an object as a number": Call(multiarray.scalar, np.dtype("O"), b"A" * 8),
        "a number cut off": Call(multiarray.scalar, plain_dtype, b"A" * 4),
        "a buffer of another size": Call(np._core.numeric._frombuffer, b"A" * 8, plain_dtype, (9,), "C"),
        "an array made by its class": Call(np.ndarray, (10**12,)),
        "a dtype by a list": Call(np.dtype, [("a", "O")]),
        "text in another encoding": Call(__import__("_codecs").encode, "x", "rot13"),
        "a record with arguments": Call(Demo, "x"),
        "an ordered dict of items": Call(__import__("collections").OrderedDict, [["a", 1]]),
        "keys that are tuples": {(1, 2): 3},
        "a class": Observation,
        "a set": {1, 2},
    }


@pytest.mark.parametrize("name", forged())
@pytest.mark.parametrize("protocol", (2, 4))
def test_forged_objects(name, protocol):
    refused(dump(forged()[name], protocol), "refused$|damaged")


STATES = {
    "slots": (None, {"__class__": 1}),
    "a list": [1],
    "a class": {"__class__": 1},
    "a number": {1: 2},
    "a reduce": {"gripper_open": 1.0, "__reduce__": 1},
}


@pytest.mark.parametrize("name", STATES)
def test_a_record_takes_only_attributes(name):
    state = pickle.dumps(STATES[name], 2)[2:-1]
    refused(b"\x80\x02crlbench.backend.observation\nObservation\n)\x81" + state + b"b.")
    refused(
        b"\x80\x02crlbench.demo\nDemo\n)\x81}X\x0d\x00\x00\x00_observations]"
        b"crlbench.backend.observation\nObservation\n)\x81" + state + b"basb."
    )


RAW = {  # hand-made streams: opcode tricks
    "persistent id": b"\x80\x04U\x01xQ.",
    "extension": b"\x80\x04\x82\x01.",
    "instance": b"\x80\x02(cos\nsystem\nos\nsystem\n.",
    "old object": b"\x80\x02(ios\nsystem\n.",
    "protocol 0": b"cos\nsystem\n(S'x'\ntR.",
    "protocol 9": b"\x80\x09N.",
    "empty": b"",
    "nothing on the stack": b"\x80\x04.",
    "state of a list": b"\x80\x04]}b.",
    "state of nothing": b"\x80\x04}b.",
    "items of a number": b"\x80\x04K\x01K\x01a.",
    "odd items": b"\x80\x04}(K\x01u.",
    "no mark": b"\x80\x04K\x01t.",
    "unknown memo": b"\x80\x04h\x07.",
    "text without end": b"\x80\x04X\xff\xff\xff\x7fab.",
    "no text": b"\x80\x04\x8c\x02\xff\xfe.",
    "gigabytes of bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "no stop": b"\x80\x04]]]",
    "list called": b"\x80\x04])R.",
    "name of numbers": b"\x80\x04K\x01K\x01\x93.",
    "name with line ends": b"\x80\x04\x8c\x04o\ns\r\x8c\x01x\x93.",
    "dict of two states": b"\x80\x02crlbench.demo\nDemo\n)\x81}X\x01\x00\x00\x00aNsb}X\x01\x00\x00\x00bNsb.",
}


@pytest.mark.parametrize("name", RAW)
def test_opcode_tricks(name):
    refused(RAW[name])


def test_resources_are_bounded():
    """What fells Python's own unpickler: nesting that overflows the C stack, memo numbers and lengths of gigabytes."""
    refused(b"\x80\x04})" + b"\x85" * 500_000 + b"Ns.", "keys that are no text")  # a key nested half a million deep
    load(b"\x80\x04)" + b"\x85" * 500_000 + b".")
    load(b"\x80\x04" + b"](" * 100_000 + b"e" * 100_000 + b".")
    refused(b"\x80\x04Nr\xff\xff\xff\xff.", "a memo out of order")  # memo number 4 billion
    begun = time.process_time()
    keys = [b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(100_000)]  # one hash
    refused(b"\x80\x04}(" + b"".join(keys[:9_000]) + b"u(" + b"".join(keys) + b"u.", "10,000 numbers as keys")
    record = b"crlbench.backend.observation\nObservation\nq\x00)\x81"
    state = b"}(" + b"".join(b"X\x04\x00\x00\x00%04xN" % i for i in range(20_000)) + b"uq\x01"
    refused(b"\x80\x02" + record + state + b"b" + b"0h\x00)\x81h\x01b" * 5_000 + b".", "more attributes than it has")
    assert time.process_time() - begun < 5
    text = b"X\x10\x27\x00\x00" + b"x" * 10_000 + b"q\x00X\x06\x00\x00\x00latin1q\x01c_codecs\nencode\nq\x02"
    refused(b"\x80\x02" + text + b"h\x02h\x00h\x01\x86R" * 100 + b".", "makes more bytes than it has")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restricted_pickle, "MAX_OPCODES", 1000)
        refused(b"\x80\x04" + b"N0" * 500 + b"N.", "more than 1,000 opcodes")
    refused(b"\x80\x04" + bytes(MAX_BYTES), "at most 67,108,864 are read")


# --- any bytes at all ----------------------------------------------------------------------------------------------


GOOD = [dump(Demo(observations(1, seed=5)), p) for p in (2, 5)]


def safe(data):
    """Either a value or one line; never another error."""
    try:
        load(data)
    except CorruptEpisode as error:
        assert str(error).startswith("rlbench episode 3: low_dim_obs.pkl ") and "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes(data):
    safe(data)
    safe(b"\x80\x04" + data)
    safe(b"\x80\x04]}(K\x01\x8c\x01a)" + data + b".")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_damage_anywhere(data, draw):
    at = draw.draw(st.integers(0, len(data) - 1))
    refused(data[:at])
    safe(data[:at] + bytes([draw.draw(st.integers(0, 255))]) + data[at + 1 :])
    safe(data[:at] + data[at + draw.draw(st.integers(1, 40)) :])
