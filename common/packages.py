"""Optional packages: which are installed, and the error for one that is not."""

from __future__ import annotations

import importlib.util

from ..errors import UserError


def version_of(package: str) -> str | None:
    """Version of an installed package; None when it is missing."""
    import importlib.metadata  # takes 8 ms, and most commands need no version

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_package(package: str, what: str, extra: str, *, module: str = "", instead: str = "") -> None:
    """`UserError` where `package` is not installed; see `missing_package`. `module`: its name in Python if another."""
    if importlib.util.find_spec(module or package) is None:
        raise missing_package(package, what, extra, instead)


def missing_package(package: str, what: str, extra: str, instead: str = "") -> UserError:
    """The error where `what` needs a package that an extra of dvla installs, and what can be done `instead`."""
    remedy = f"pip install 'dvla[{extra}]'" + (f", or {instead}" if instead else "")
    return UserError(f"{what} needs the package {package}, which is not installed: {remedy}")
