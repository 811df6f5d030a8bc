"""Attempts to leave the sandbox, which a run makes before its first step and the tests make under
every user.

    layers = check(Limits(timeout_s=5, memory_mb=256))   # a SandboxError where one succeeds
    python -m workers.rewards.sandbox                     # says which layers hold here
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workers.rewards.sandbox.processes import Limits, SandboxError, started

ATTEMPTS = {
    "network": "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "datagrams": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "local sockets": "import socket; socket.socket(socket.AF_UNIX).connect('\\0x')",
    "netlink": "import socket; socket.socket(16, socket.SOCK_RAW, 0)",
    "fork": "os.fork() or os._exit(0)",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"escaped exec\")'])",
    "clone3": "assert call(435, 0, 0) != -1 or errno() != 38",
    "read passwd": "open('/etc/passwd').read()",
    "read home": "os.listdir('/root' if OUTER_USER == 0 else OUTER_HOME)",
    "read temp": "os.listdir(OUTER_DIRECTORY)",
    "read secret": "open(SECRET).read()",
    "symbolic link": "os.symlink(SECRET, 'link'); open('link').read()",
    "hard link": "os.link(SECRET, 'hard'); open('hard').read()",
    "parent directory": "open('../program.py').read()",
    "write library": "open(os.__file__, 'a')",
    "write temp": "open('/tmp/escaped', 'w')",
    "write shared memory": "open('/dev/shm/escaped', 'w')",
    "truncate": "os.truncate(SECRET, 0)",
    "change mode": "os.chmod(SECRET, 0o777)",
    "change time": "os.utime(SECRET)",
    "process list": "assert [name for name in os.listdir('/proc') if name.isdigit()]",
    "parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "own mappings": "open('/proc/self/maps').read()",
    "kill parent": "os.kill(OUTER_PID, 0)",
    "kill everything": "os.kill(-1, 0)",
    "kill group": "os.killpg(0, 0)",
    "trace parent": "assert call('ptrace', 16, OUTER_PID, 0, 0) == 0",
    "read memory of parent": "assert call('process_vm_readv', OUTER_PID, 0, 0, 0, 0, 0) >= 0",
    "limits of parent": "import resource; resource.prlimit(OUTER_PID, resource.RLIMIT_CORE)",
    "raise limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "become root": "os.setuid(0)",
    "memory file": "os.memfd_create('x')",
    "shared memory": "assert call('shmget', 0, 4096, 0o1600) >= 0",
    "message queue": "assert call('mq_open', b'/x', 0o102, 0o600, None) >= 0",
    "name space": "assert call('unshare', 0x10000000) == 0",
    "mount": "assert call('mount', b'none', b'/', b'tmpfs', 0, None) == 0",
    "chroot": "os.chroot('.')",
    "keys": "assert call('add_key', b'user', b'x', b'y', 1, -4) >= 0",
    "kernel program": "assert call('bpf', 0, 0, 0) >= 0",
    "performance events": "assert call('perf_event_open', 0, 0, -1, -1, 0) >= 0",
    "io_uring": "assert call(425, 1, bytes(120)) >= 0",
    "process handle": "assert call(434, OUTER_PID, 0) >= 0",
    "device": "os.mknod('device', 0o20600, 0x0101)",
    "open descriptors": "assert open_descriptors()",
    "environment": "assert os.environ.get('SANDBOX_TEST_SECRET')",
}
"""Each succeeds only outside. Descriptors, paths, and numbers in capitals are the starter's."""

PREFACE = """
import ctypes, os, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
errno = ctypes.get_errno
X86 = {"ptrace": 101, "process_vm_readv": 310, "shmget": 29, "mq_open": 240, "unshare": 272,
    "mount": 165, "add_key": 248, "bpf": 321, "perf_event_open": 298}
ARM = {"ptrace": 117, "process_vm_readv": 270, "shmget": 194, "mq_open": 180, "unshare": 97,
    "mount": 40, "add_key": 217, "bpf": 280, "perf_event_open": 241}
NUMBERS = X86 if platform.machine() == "x86_64" else ARM
def call(name, *arguments):
    return libc.syscall(NUMBERS.get(name, name), *arguments)
def open_descriptors():
    found = []
    for descriptor in range(3, 64):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        found.append(descriptor)
    return found
"""


def probe(secret: Path) -> str:
    """A program that makes every attempt and prints the names of those that succeed."""
    names = {
        "OUTER_PID": os.getpid(),
        "OUTER_USER": os.getuid(),
        "OUTER_HOME": os.environ.get("HOME", "/"),
        "OUTER_DIRECTORY": str(secret.parent),
        "SECRET": str(secret),
    }
    lines = [PREFACE, *(f"{name} = {value!r}" for name, value in names.items())]
    for name, attempt in ATTEMPTS.items():
        lines.append(f"def attempt():\n    {attempt}")
        lines.append("try:\n    attempt()\nexcept BaseException:\n    pass")
        lines.append(f"else:\n    print({name!r}, flush=True)")
    lines.append("print('every attempt was made')")
    return "\n".join(lines)


def check(limits: Limits) -> Mapping[str, Any]:
    """The layers that hold here; a SandboxError that names the attempts that succeeded."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as written:
        secret = Path(directory, "secret")
        secret.write_text("secret")
        with started("run", probe(secret), limits, stdout=written) as running:
            layers = running.read_layers()
            status = running.wait(limits.timeout_s)
        written.seek(0)
        *escaped, last = written.read().decode().splitlines() or [""]
    if escaped or last != "every attempt was made":
        raise SandboxError(
            f"the sandbox does not hold here: {', '.join([*escaped, last][:10])} (status {status})"
        )
    return layers


@cache
def check_once() -> str:
    """check, once in a process: what a log says of it."""
    layers = check(Limits(timeout_s=20.0, memory_mb=256))
    spaces = "name spaces and a file system of its own"
    if not layers["namespaces"]:
        spaces = "no name spaces, which this machine does not allow"
    return (
        f"programs run in a sandbox: Landlock {layers['landlock']}, seccomp, limits, user "
        f"{layers['user']}, {spaces}; {len(ATTEMPTS)} attempts to leave it failed"
    )
