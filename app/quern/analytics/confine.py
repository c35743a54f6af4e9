"""Confinement of the calling process by the kernel: Landlock, seccomp, capabilities and resource limits.

For a process that runs what strangers wrote. Afterwards it can read the files that it was given and nothing else; it
can create, change, rename and remove nothing; it has no socket, no thread, no new process, no other program, and
no way back.

Landlock: Linux `Documentation/userspace-api/landlock.rst`. Seccomp: `Documentation/userspace-api/seccomp_filter.rst`.
"""

import ctypes
import math
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final


class CannotConfineError(RuntimeError):
    """This kernel or machine lacks a part of the confinement; nothing may run without it."""


#: What a process tells its parent once it is confined.
CONFINED: Final = b"\n"

_libc = ctypes.CDLL(None, use_errno=True)

# Landlock

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
#: Rights over files that each version of the interface knows: all are taken away.
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
#: Binding and connecting TCP sockets; abstract UNIX sockets and signals to the world outside.
_NETWORK_RIGHTS: Final = 0b11
_SCOPES: Final = 0b11

_NO_NEW_PRIVS: Final = 38
_CAPBSET_DROP: Final = 24
_SET_SECCOMP: Final = 22
_SECCOMP_FILTER: Final = 2
_DAC_READ_SEARCH: Final = 2

# Seccomp: what may be called. Anything else fails with EPERM.

#: x86-64 numbers, `arch/x86/entry/syscalls/syscall_64.tbl`.
_ALLOWED: Final = {
    "read": 0,
    "write": 1,
    "close": 3,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "pread64": 17,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "dup": 32,
    "nanosleep": 35,
    "getpid": 39,
    "exit": 60,
    "uname": 63,
    "fcntl": 72,
    "getcwd": 79,
    "readlink": 89,
    "gettimeofday": 96,
    "getrusage": 98,
    "sysinfo": 99,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "sigaltstack": 131,
    "gettid": 186,
    "time": 201,
    "futex": 202,
    "sched_getaffinity": 204,
    "getdents64": 217,
    "fadvise64": 221,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "openat": 257,
    "newfstatat": 262,
    "set_robust_list": 273,
    "getrandom": 318,
    "membarrier": 324,
    "statx": 332,
    "rseq": 334,
    "faccessat2": 439,
}
_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000

_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_GREATER_EQUAL: Final = 0x35
_RETURN: Final = 0x06
_KILL: Final = 0x80000000
_ERRNO: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000
_EPERM: Final = 1


def landlock_version() -> int:
    """The version of the kernel's Landlock interface; 0 where there is none."""
    found = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    return max(0, int(found))


def confine(readable: Sequence[Path], *, memory_bytes: int, cpu_seconds: int, open_files: int = 1024) -> None:
    """Give everything up but reading `readable` files and the descriptors that are open. There is no way back.

    Args:
        memory_bytes: address space beyond what the process has now.
        cpu_seconds: processor time beyond what the process has used.

    Raises:
        CannotConfineError: the kernel cannot do all of it, or the process has several threads already.
    """
    if platform.machine() != "x86_64":
        raise CannotConfineError(f"expected an x86-64 machine, found {platform.machine()}")
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        # It takes effect for the calling thread alone.
        raise CannotConfineError(f"expected a process of one thread, found {threads}")
    _limit(memory_bytes, cpu_seconds, open_files)
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _restrict_files(readable)
    _drop_capabilities()
    _filter_calls()


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise CannotConfineError(f"{what}: {os.strerror(error)}")
    return result


def _limit(memory_bytes: int, cpu_seconds: int, open_files: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes,
        resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds,
        # Not a byte to any file, whatever else should fail; pipes are not meant.
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: open_files,
    }
    for which, limit in limits.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            limit = min(limit, ceiling)
        resource.setrlimit(which, (limit, limit))


def _restrict_files(readable: Iterable[Path]) -> None:
    version = landlock_version()
    if version < 1:
        raise CannotConfineError("expected a kernel with Landlock (5.13 or later, `lsm=` with landlock), found none")
    rights = max(_FILE_RIGHTS[known] for known in _FILE_RIGHTS if known <= version)
    attributes = struct.pack("Q", rights)
    if version >= 4:
        attributes += struct.pack("Q", _NETWORK_RIGHTS)
    if version >= 6:
        attributes += struct.pack("Q", _SCOPES)
    ruleset = _check(
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)), "Landlock"
    )
    try:
        for path in readable:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                rule = struct.pack("=Qi", _READ_FILE, handle)
                _check(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint32(0)), "a Landlock rule")
            finally:
                os.close(handle)
        _check(_libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "Landlock")
    finally:
        os.close(ruleset)


def _drop_capabilities() -> None:
    # A process of root keeps the right to read what others own, within what Landlock leaves: an operator's own.
    kept = 1 << _DAC_READ_SEARCH if os.geteuid() == 0 else 0
    if os.geteuid() == 0:
        # Numbers that the kernel does not know are refused, which is as good.
        for capability in range(64):
            _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("=Ii", 0x20080522, 0)
    held = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, held), "capget")
    if not any(held.raw):
        # A hardened unit has none, and may refuse even to ask for fewer.
        return
    data = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    _check(_libc.capset(header, data), "capset")


def _filter_calls() -> None:
    program: list[bytes] = []

    def add(code: int, jump_true: int, jump_false: int, value: int) -> None:
        program.append(struct.pack("=HBBI", code, jump_true, jump_false, value))

    add(_LOAD, 0, 0, 4)
    add(_JUMP_EQUAL, 1, 0, _ARCH_X86_64)
    add(_RETURN, 0, 0, _KILL)
    add(_LOAD, 0, 0, 0)
    add(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT)
    add(_RETURN, 0, 0, _KILL)
    for number in sorted(_ALLOWED.values()):
        add(_JUMP_EQUAL, 0, 1, number)
        add(_RETURN, 0, 0, _ALLOW)
    add(_RETURN, 0, 0, _ERRNO | _EPERM)
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, filter_, 0, 0), "seccomp")
