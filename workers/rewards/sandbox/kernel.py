"""Landlock, seccomp, name spaces, and limits, by ctypes: what the kernel refuses this process from
here on, whatever runs in it. Linux on x86_64 and aarch64. Imports nothing of the project.

Landlock and seccomp need no privileges. Name spaces come on top where the kernel allows them: a file
system in which nothing else exists, and a network that leads nowhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
WORK_BYTES = 64 * 2**20
"""The most that a program may write into its directory, all files together."""
FILE_BYTES = 16 * 2**20
NUM_TASKS = 64
NOBODY = 65534
FIRST_USER = 0x10000000
"""Root's programs run as this user plus their process' number: as nobody else, so that limits on
tasks count theirs alone and no signal reaches another one."""

NEW_MOUNTS, NEW_NAMES, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_NETWORK = 0x10000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND = 1, 2, 4, 32, 4096
RECURSIVE, PRIVATE, RELATIVE_ATIME, DETACH = 16384, 1 << 18, 1 << 21, 2
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER, DROP_BOUNDING = 38, 22, 2, 24


class NoSandbox(Exception):
    """A layer that must hold does not."""


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# Name spaces.


def leave_namespaces() -> bool:
    """Own mounts, network, IPC and host name; with a user name space where this is not root."""
    flags = NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_NAMES
    user, group = os.getuid(), os.getgid()
    if user != 0:
        flags |= NEW_USERS
    if LIBC.unshare(flags) < 0:
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    result = LIBC.mount(
        source.encode() if source else None,
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    check(result, f"mount {target}")


def enter_own_root(directory: str, readable: list[str], work: str, user: int) -> None:
    """A root in memory that holds `readable`, read-only, and an empty directory `work`."""
    mount(None, "/", None, RECURSIVE | PRIVATE)
    options = f"size={WORK_BYTES},nr_inodes=4096,mode=755"
    mount("tmpfs", directory, "tmpfs", NO_SETUID | NO_DEVICES, options)
    for path in readable:
        inside = Path(directory + path)
        if Path(path).is_dir():
            inside.mkdir(parents=True, exist_ok=True)
        else:
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.touch()
        mount(path, str(inside), None, BIND | RECURSIVE)
        if not Path(path).is_char_device():
            mount(None, str(inside), None, BIND | REMOUNT | READ_ONLY | flags_of(path))
    inside = Path(directory + work)
    inside.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        os.chown(inside, user, user)
    os.chdir(directory)
    check(LIBC.pivot_root(b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", DETACH), "umount the old root")
    os.chdir("/")


def flags_of(path: str) -> int:
    """The flags of a mount, which a user name space may not take away, and two more."""
    flags = os.statvfs(path).f_flag
    kept = flags & (NO_SETUID | NO_DEVICES | 8 | 1024 | 2048)
    return kept | NO_SETUID | NO_DEVICES | (RELATIVE_ATIME if flags & 4096 else 0)


# Users and limits.


def leave_root(user: int) -> int:
    """Another user than root, for good; the user that it is."""
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:  # a container whose users are few
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    return os.getuid()


def drop_capabilities() -> None:
    """Those that a user name space gave to its first process."""
    header = struct.pack("Ii", 0x20080522, 0)
    check(LIBC.capset(header, struct.pack("6I", 0, 0, 0, 0, 0, 0)), "capset")


def tasks_of_user() -> int:
    """Processes and threads that this user runs already."""
    tasks = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.stat().st_uid == os.getuid():
                tasks += len(list((path / "task").iterdir()))
        except OSError:
            continue
    return tasks


def limit(seconds: int, memory_bytes: int, tasks: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


# Landlock.

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE, READ, LIST, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE | READ | TRUNCATE
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files by version; later versions have no more."""


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, int(LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def landlock(readable: list[str], writable: list[str]) -> int:
    """Leaves these files and directories, and no others; the version of Landlock."""
    version = landlock_version()
    if version < 1:
        raise NoSandbox("this kernel has no Landlock (5.13 or later, with landlock in its lsm=)")
    handled = (1 << RIGHTS[min(version, 5)]) - 1
    attributes = struct.pack("QQQ", handled, 3, 3)  # and no TCP, no other's signals and sockets
    size = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}.get(version, 24)
    ruleset = check(
        LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock ruleset"
    )
    for paths, rights in ((readable, READ | LIST | EXECUTE), (writable, handled)):
        for path in paths:
            if not Path(path).exists():
                continue
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights & handled
            if not Path(path).is_dir():
                allowed &= FILE_RIGHTS
            rule = struct.pack("=Qi", allowed, descriptor)
            check(LIBC.syscall(ADD_RULE, ruleset, 1, rule, 0), f"landlock {path}")
            os.close(descriptor)
    check(LIBC.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)
    return version


# Seccomp.

X86_64 = """socket 41, connect 42, bind 49, listen 50, fork 57, vfork 58, execve 59, shmget 29,
    shmat 30, shmctl 31, semget 64, semctl 66, msgget 68, msgctl 71, truncate 76, chmod 90,
    fchmod 91, chown 92, fchown 93, lchown 94, ptrace 101, syslog 103, rt_sigqueueinfo 129,
    utime 132, mknod 133, personality 135, setpriority 141, sched_setparam 142,
    sched_setscheduler 144, modify_ldt 154, pivot_root 155, adjtimex 159, chroot 161, acct 163,
    settimeofday 164, mount 165, umount2 166, swapon 167, swapoff 168, reboot 169, sethostname 170,
    setdomainname 171, iopl 172, ioperm 173, init_module 175, delete_module 176, quotactl 179,
    setxattr 188, lsetxattr 189, fsetxattr 190, removexattr 197, lremovexattr 198,
    fremovexattr 199, tkill 200, sched_setaffinity 203, clock_settime 227, utimes 235, mq_open 240,
    kexec_load 246, add_key 248, request_key 249, keyctl 250, ioprio_set 251, migrate_pages 256,
    mknodat 259, fchownat 260, futimesat 261, fchmodat 268, unshare 272, move_pages 279,
    utimensat 280, rt_tgsigqueueinfo 297, perf_event_open 298, fanotify_init 300,
    name_to_handle_at 303, open_by_handle_at 304, clock_adjtime 305, setns 308,
    process_vm_readv 310, process_vm_writev 311, kcmp 312, finit_module 313, sched_setattr 314,
    memfd_create 319, kexec_file_load 320, bpf 321, execveat 322, userfaultfd 323"""
AARCH64 = """setxattr 5, lsetxattr 6, fsetxattr 7, removexattr 14, lremovexattr 15,
    fremovexattr 16, ioprio_set 30, mknodat 33, umount2 39, mount 40, pivot_root 41, truncate 45,
    chroot 51, fchmod 52, fchmodat 53, fchownat 54, fchown 55, quotactl 60, utimensat 88, acct 89,
    personality 92, unshare 97, kexec_load 104, init_module 105, delete_module 106,
    clock_settime 112, syslog 116, ptrace 117, sched_setparam 118, sched_setscheduler 119,
    sched_setaffinity 122, tkill 130, rt_sigqueueinfo 138, setpriority 140, reboot 142,
    sethostname 161, setdomainname 162, settimeofday 170, adjtimex 171, mq_open 180, msgget 186,
    msgctl 187, semget 190, semctl 191, shmget 194, shmctl 195, shmat 196, socket 198, bind 200,
    listen 201, connect 203, add_key 217, request_key 218, keyctl 219, execve 221, swapon 224,
    swapoff 225, migrate_pages 238, move_pages 239, rt_tgsigqueueinfo 240, perf_event_open 241,
    fanotify_init 262, name_to_handle_at 264, open_by_handle_at 265, clock_adjtime 266, setns 268,
    process_vm_readv 270, process_vm_writev 271, kcmp 272, finit_module 273, sched_setattr 274,
    memfd_create 279, bpf 280, execveat 281, userfaultfd 282, kexec_file_load 294"""
MACHINES = {
    "x86_64": (0xC000003E, X86_64, {"clone": 56, "kill": 62, "tgkill": 234, "prlimit": 302}, 16),
    "aarch64": (
        0xC00000B7,
        AARCH64,
        {"clone": 220, "kill": 129, "tgkill": 131, "prlimit": 261},
        29,
    ),
}
"""Audit number, refused calls, calls that depend on an argument, and ioctl."""
NEW_CALLS = 424
"""From here on numbers are the same on all machines, and all calls but these are refused."""
NEW_ALLOWED = (436, 437, 439, 441, 449)
"""close_range, openat2, faccessat2, epoll_pwait2, futex_waitv. clone3 hides its flags in memory: the
C library falls back to clone."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
THREAD = 0x00010000
"""clone's flag for a thread of this process."""
PUSH_TO_TERMINAL, LINUX_CONSOLE = 0x5412, 0x541C


def seccomp() -> None:
    """No new process or program, no socket, no other process, no mount, no kernel object that
    outlives this one. Threads may begin."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise NoSandbox(
            f"the sandbox knows the system calls of {', '.join(MACHINES)}, not {machine}"
        )
    audit, refused, partly, ioctl = MACHINES[machine]
    deny = (RETURN, 0, 0, ERROR | errno.EPERM)
    allow = (RETURN, 0, 0, ALLOW)
    own = os.getpid()
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    code.append((AT_LEAST, 0, 2 * len(NEW_ALLOWED) + 1, NEW_CALLS))
    for number in NEW_ALLOWED:
        code += [(EQUAL, 0, 1, number), allow]
    code.append((RETURN, 0, 0, ERROR | errno.ENOSYS))
    for call in refused.split(","):
        code += [(EQUAL, 0, 1, int(call.split()[1])), deny]
    code += [(EQUAL, 0, 4, partly["clone"]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, THREAD), allow, deny]
    for name in ("kill", "tgkill"):  # this process alone
        code += [(EQUAL, 0, 4, partly[name]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, own), allow, deny]
    code += [(EQUAL, 0, 5, partly["prlimit"]), (LOAD, 0, 0, 16), (EQUAL, 1, 0, 0)]
    code += [(EQUAL, 0, 1, own), allow, deny]
    code += [(EQUAL, 0, 5, ioctl), (LOAD, 0, 0, 24), (EQUAL, 1, 0, PUSH_TO_TERMINAL)]
    code += [(EQUAL, 0, 1, LINUX_CONSOLE), deny, allow]
    code.append(allow)
    text = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    check(LIBC.prctl(SET_SECCOMP, FILTER, program, 0, 0), "seccomp")


def no_new_privileges() -> None:
    check(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
