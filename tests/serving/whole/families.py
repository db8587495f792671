"""Runs a command whose sockets may be of some families only, as systemd's ``RestrictAddressFamilies=`` has it.

``families.py AF_INET,AF_UNIX COMMAND…``. The kernel refuses others, by a filter of system calls (seccomp).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

SOCKET = {"x86_64": 41, "aarch64": 198}
"""The number of the system call that makes a socket."""
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EAFNOSUPPORT
NUMBER, FIRST_ARGUMENT = 0, 16
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    families = [int(getattr(socket, name)) for name in sys.argv[1].split(",")]
    steps = [(LOAD, 0, 0, NUMBER), (EQUAL, 0, len(families) + 2, SOCKET[platform.machine()])]
    steps += [(LOAD, 0, 0, FIRST_ARGUMENT)]
    steps += [(EQUAL, len(families) - n, 0, family) for n, family in enumerate(families)]
    steps += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    program = Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    library = ctypes.CDLL(None, use_errno=True)
    for asked in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SECCOMP, FILTER, ctypes.byref(program), 0, 0)):
        if library.prctl(*asked) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no such filter")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
