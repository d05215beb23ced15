"""Runs Python with arguments in a process that the kernel kills at its first internet socket (seccomp, Linux).

Not a guard in Python: compiled libraries and their threads are held to it, too. A process of the user can do this to
itself, in a container as well, without privileges and without anything installed. A stream of IPv6 is refused and not
deadly: urllib3 makes one when it is imported, to see whether there is IPv6. What looks up a name sends a datagram.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Name of the architecture in the kernel's words, number of its system call `socket`."""
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EAFNOSUPPORT


def forbid() -> None:
    """From here on, for this process and all that come of it."""
    architecture, call = CALLS[platform.machine()]
    load, both, equal, answer = 0x20, 0x54, 0x15, 0x06
    lines = [
        (load, 0, 0, 4), (equal, 0, 8, architecture), (load, 0, 0, 0), (equal, 0, 6, call),
        (load, 0, 0, 16), (equal, 5, 0, socket.AF_INET), (equal, 0, 3, socket.AF_INET6),
        (load, 0, 0, 24), (both, 0, 0, 0xF), (equal, 2, 1, socket.SOCK_STREAM),
        (answer, 0, 0, ALLOW), (answer, 0, 0, KILL), (answer, 0, 0, REFUSE),
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
