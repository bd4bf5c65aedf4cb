"""The outermost boxes of MP4 and MOV files (ISO/IEC 14496-12, section 4.2)."""

import io
import struct
from typing import BinaryIO

MOST = 100_000  # boxes that are looked at; an hour of fragments of a second has 7,200


def is_cut(file: BinaryIO) -> bool:
    """Whether a fragmented file ends within a box.

    Every fragment is a box moof, of times and sizes, and a box mdat, of pictures. PyAV reads a file
    that has lost its last fragments as a shorter video. A file that ends right between two
    fragments looks whole.
    """
    end = file.seek(0, io.SEEK_END)
    at, fragmented = 0, False
    for _ in range(MOST):
        if at >= end:
            return fragmented and at > end
        file.seek(at)
        header = file.read(16)
        if len(header) < 8:
            return fragmented
        size, kind = struct.unpack_from(">I4s", header)
        fragmented = fragmented or kind == b"moof"
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack_from(">Q", header, 8)
        elif size == 0:  # up to the end of the file
            return False
        if size < 8:  # no box
            return False
        at += size
    return False
