"""Looks at parts of HDF5 files in a process of its own, since libhdf5 can loop or crash over damaged ones.

Started by `hdf5_child` as a script: a line of JSON [path, name of a group, whether to look below its members] in, a
line out. A part that takes too long, or too much memory, ends this process.
"""

import contextlib
import json
import os
import resource
import signal
import sys

SECONDS = 2.0  # of the processor, for one object
NBYTES = 2 << 30
MEMBERS = 64  # of a group that are looked into: those with more hold one image each
TEXTS = 10_000  # strings of a dataset that are read
Damage = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)  # the reader will see it, too


def main() -> None:
    if sys.path[:1] == [os.path.dirname(os.path.abspath(__file__))]:
        del sys.path[0]  # modules here are none of those that h5py means
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who asks decides
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, NBYTES)):
        with contextlib.suppress(OSError, ValueError):  # a lower one is set already
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
    import h5py

    print("ready", flush=True)
    for line in sys.stdin:
        path, name, below = json.loads(line)
        try:
            _alarm()
            with h5py.File(path, "r", locking="best-effort") as file:
                _look(file, name, below)
        except Damage:
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("done", flush=True)


def _alarm() -> None:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process: no handler would be called


def _look(file, name, below) -> None:  # type: ignore[no-untyped-def]
    """All objects below a group by hard links, or the group and its members alone."""
    import h5py

    seen, left = set(), [(file[name] if name else file, 0)]
    while left:
        node, depth = left.pop()
        _alarm()
        try:
            address = h5py.h5o.get_info(node.id).addr
            if address in seen:
                continue
            seen.add(address)
            for key in node.attrs:
                node.attrs[key]
            if isinstance(node, h5py.Dataset):
                _describe(node)
                continue
            names = list(node)
            for part in names[:MEMBERS] if below or depth == 0 else ():
                if isinstance(node.get(part, getlink=True), h5py.HardLink):
                    left.append((node[part], depth + 1))
        except Damage:
            continue


def _describe(array) -> None:  # type: ignore[no-untyped-def]
    import h5py

    array.id.get_create_plist().get_nfilters(), array.is_virtual, array.id.get_space_status()
    if array.chunks and array.size:
        array.id.get_num_chunks()
    if array.external or array.is_virtual:  # in other files, which are not read
        return
    if h5py.check_string_dtype(array.dtype) is not None and array.shape is not None and array.size <= TEXTS:
        array[()]


if __name__ == "__main__":
    main()
