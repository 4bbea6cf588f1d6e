"""Members of shards as .npy: their headers, written and checked. Imports no torch: readers use it.

In: bytes that a stranger may have written, and the array that the manifest says they are. Out: that array, a view of
the bytes, or what is wrong. A header is compared with the one that NumPy writes; another one is parsed, as text of a
limited length, and must say the same type, order and shape. So no object, no other type, no negative or huge shape gets
to NumPy.
"""

import io
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

HEADER = 128  # bytes of the header that NumPy writes for any array of ours
MAX_HEADER = 1024  # bytes: other writers pad otherwise


class Array(NamedTuple):
    """Type and shape of a member.

    Attributes:
        dtype: "<i2" or "<f2".
        shape: [samples], or [frames, mel_bins].
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its payload, without the header."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def fits(self, size: int) -> bool:
        """Whether a member of `size` bytes can be this array and a header."""
        return self.size < size <= self.size + MAX_HEADER


@lru_cache(maxsize=16)
def header(array: Array) -> bytes:
    """The header that NumPy writes, in C order."""
    out = io.BytesIO()
    content = {"descr": array.dtype, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(out, content)
    return out.getvalue()


def header_problem(found: bytes, array: Array) -> str | None:
    """What is wrong with a header; None: it is that of `array`, in C order.

    Args:
        found: All bytes before the payload.
        array: What it must say.
    """
    if found == header(array):
        return None
    if len(found) > MAX_HEADER:
        return f"its .npy header has {len(found)} bytes"
    file = io.BytesIO(found)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file, max_header_size=MAX_HEADER)
    except Exception:  # noqa: BLE001 (NumPy evaluates the text: a stranger's may raise anything)
        return "it has no .npy header"
    if (dtype.str, shape) != array or fortran_order or file.tell() != len(found):
        order = "Fortran" if fortran_order else "C"
        return f"its .npy header says {dtype.str} {shape} in {order} order, the manifest {array.dtype} {array.shape}"
    return None


def decode(member: bytes | memoryview, array: Array) -> np.ndarray:
    """The array of a member: a view of its bytes.

    Raises:
        ValueError: they are not that array.
    """
    length = len(member) - array.size
    if not array.fits(len(member)):
        raise ValueError(f"{len(member)} bytes, {array.dtype} {array.shape} has {array.size} and a header")
    problem = header_problem(bytes(member[:length]), array)
    if problem is not None:
        raise ValueError(problem)
    return np.frombuffer(member, array.dtype, offset=length).reshape(array.shape)
