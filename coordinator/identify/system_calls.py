"""Taking from this process, for good, what a reader of bytes does not need: files, programs, sockets, other processes.

Owns the two ways Linux has for it, each applied where the kernel offers it: Landlock, an empty set of files and ports
(landlock(7)), and a seccomp filter (seccomp(2)) that knows the few calls that reading and computing take. What starts a
program or a process, or makes a socket, ends the process. All else that is not known fails, opening a file as well:
Python's own parser tries that, to show the line of a syntax error.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from collections.abc import Mapping

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_CREATE_RULESET, _RESTRICT_SELF, _ASK_VERSION = 444, 446, 1  # the same numbers on every architecture
_FILES = (0, 13, 14, 15, 15, 16, 16)  # by version: how many kinds of access to files it knows
_NETWORK = 2  # kinds of access to TCP ports, from version 4 on
_SCOPES = 2  # abstract sockets and signals, from version 6 on

_ALLOW, _ERROR_NOT_PERMITTED, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOWED: Mapping[str, tuple[int, ...]] = {
    # read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 readv
    # writev sched_yield mremap madvise getpid exit gettimeofday getrusage sigaltstack gettid futex restart_syscall
    # clock_gettime clock_getres exit_group set_robust_list getrandom rseq
    "x86_64": (
        0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 24, 25, 28, 39, 60, 96, 98, 131, 186, 202, 219, 228, 229,
        231, 273, 318, 334,
    ),
    "aarch64": (
        63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 65, 66, 124, 216, 233, 172, 93, 169, 165, 132, 178,
        98, 128, 113, 114, 94, 99, 278, 293,
    ),
}  # fmt: skip
_KILLED: Mapping[str, tuple[int, ...]] = {
    # execve execveat socket socketpair connect bind clone fork vfork clone3 ptrace kill process_vm_readv
    # process_vm_writev io_uring_setup
    "x86_64": (59, 322, 41, 53, 42, 49, 56, 57, 58, 435, 101, 62, 310, 311, 425),
    "aarch64": (221, 281, 198, 199, 203, 200, 220, 435, 117, 129, 270, 271, 425),
}
_X32 = 0x40000000  # the third ABI of an x86_64 kernel: other numbers for the same calls

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF


def no_new_privileges(libc: ctypes.CDLL) -> bool:
    return bool(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0)


def no_files(libc: ctypes.CDLL) -> bool:
    """Landlock with no rule: no file, directory or TCP port can be reached by name. False where it is not offered."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)
    if version < 1:
        return False
    files = (1 << _FILES[min(version, len(_FILES) - 1)]) - 1
    network = (1 << _NETWORK) - 1 if version >= 4 else 0
    scopes = (1 << _SCOPES) - 1 if version >= 6 else 0
    words = (files, network, scopes)[: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = struct.pack(f"={len(words)}Q", *words)
    rules = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    return bool(rules >= 0 and libc.syscall(_RESTRICT_SELF, rules, 0) == 0)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def few_system_calls(libc: ctypes.CDLL) -> bool:
    """The seccomp filter. False where the kernel or this architecture has none. Needs `no_new_privileges`."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    code = filter_of(machine)
    program = _Program(len(code) // 8, code)
    return bool(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0)


def filter_of(machine: str) -> bytes:
    """Classic BPF over struct seccomp_data {int nr; u32 arch; ...}: one comparison for each call that is known."""
    allowed, killed = _ALLOWED[machine], _KILLED[machine]
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for number, verdict in [*((n, _ALLOW) for n in allowed), *((n, _KILL) for n in killed)]:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, verdict)]
    lines.append((_RETURN, 0, 0, _ERROR_NOT_PERMITTED))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
