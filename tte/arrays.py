"""Reads .npz files that others wrote: whatever is wrong with them is the file's fault."""

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from tte.errors import TTEError

# What numpy, zipfile and zlib raise on damaged files, found by damaging files.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path | str, code: str, fix: str) -> dict[str, np.ndarray]:
    """All arrays of the file, by name. Raises TTEError with ``code`` and ``fix`` where it cannot be read."""
    try:
        # Opened here: a file that numpy.load refuses would otherwise stay open.
        with Path(path).open("rb") as file:
            if not file.read(6).startswith((b"PK", b"\x93NUMPY")):
                raise ValueError("nothing that numpy wrote")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("one array without a name (.npy)")
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError as problem:
        raise TTEError(code, "there is no such file", where=str(path), fix=f"check the path; or {fix}") from problem
    except DAMAGE as problem:
        reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem) or type(problem).__name__
        first = reason.splitlines()[0]
        raise TTEError(code, f"not a readable .npz file: {first}", where=str(path), fix=fix) from problem
