"""Runs Python with arguments in a process that the kernel kills at its first internet socket (seccomp, Linux).

Not a guard in Python: compiled libraries and their threads are held to it, too. A process of the user can do this to
itself, in a container as well, without privileges and without anything installed.
"""

import ctypes
import os
import platform
import socket
import struct
import sys

CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Name of the architecture in the kernel's words, number of its system call `socket`."""
ALLOW, KILL = 0x7FFF0000, 0x80000000


def forbid() -> None:
    """From here on, for this process and all that come of it."""
    architecture, call = CALLS[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06
    lines = [
        (load, 0, 0, 4), (equal, 0, 5, architecture), (load, 0, 0, 0), (equal, 0, 3, call), (load, 0, 0, 16),
        (equal, 2, 0, socket.AF_INET), (equal, 1, 0, socket.AF_INET6), (answer, 0, 0, ALLOW), (answer, 0, 0, KILL),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for asked in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(program), 0, 0)):  # no new privileges, then the filter
        if libc.prctl(*(ctypes.c_ulong(value) for value in asked)):
            raise OSError(ctypes.get_errno(), "the kernel has no seccomp")


if __name__ == "__main__":
    forbid()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
