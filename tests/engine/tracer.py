"""Run a function in a child process and SIGKILL it at its k-th system call that could change a file: a small ptrace tracer.

Every such call is seen, whoever makes it (Python, safetensors' Rust, libc). A call that changes nothing that a later process sees (fsync,
opening to read) is none: a kill there is one before the next that does. x86-64 Linux only: system calls have other numbers elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable

import pytest

_TRACEME, _SYSCALL, _GETREGS, _SETOPTIONS, _KILL_WITH_TRACER, _MARK_SYSCALLS = 0, 24, 12, 0x4200, 0x100000, 0x1
_RDX, _ORIG_RAX = 12, 15  # indices in user_regs_struct, of 27 words
_OPENAT, _WRITING = 257, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = {
    1: "write", 18: "pwrite64", 20: "writev", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink",
    90: "chmod", 91: "fchmod", 257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 268: "fchmodat", 285: "fallocate",
    316: "renameat2",
}  # fmt: skip


def run_until(work: Callable[[], object], calls: int) -> int | None:
    """Fork, run `work`, and SIGKILL the child on entering its `calls`-th changing call.

    Returns:
        None if it was killed; else how many such calls the whole of `work` made.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the tracer knows the system calls of x86-64 Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    child = os.fork()
    if child == 0:
        if libc.ptrace(_TRACEME, 0, None, None) != 0:
            os._exit(99)
        os.kill(os.getpid(), signal.SIGSTOP)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("ptrace is not allowed here")
    libc.ptrace(_SETOPTIONS, child, None, _KILL_WITH_TRACER | _MARK_SYSCALLS)
    registers, seen, entering = (ctypes.c_ulonglong * 27)(), 0, True
    while True:
        libc.ptrace(_SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"the child ended by itself, status {status}"
            return seen
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            continue
        if entering:
            libc.ptrace(_GETREGS, child, None, ctypes.cast(registers, ctypes.c_void_p))
            call = registers[_ORIG_RAX]
            if call in CHANGING and (call != _OPENAT or registers[_RDX] & _WRITING):
                seen += 1
                if seen == calls:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return None
        entering = not entering
