"""python -I -S launcher.py SETTINGS: shuts itself in, says which layers hold, runs a program.

SETTINGS is the JSON of Settings. In the order in which each layer still allows the next: name
spaces, another user, limits, Landlock, seccomp. Every layer that must hold and does not is reported,
and then nothing runs. Imports nothing of the project but the files beside it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
import kernel  # noqa: E402

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
OWN_DIRECTORY = "/sandboxed-program"


def shut_in(settings: dict[str, Any]) -> dict[str, Any]:
    """The layers that hold."""
    directory, program = settings["directory"], Path(settings["program"]).read_bytes()
    readable = []
    for path in (sys.base_prefix, *settings["packages"], *LIBRARIES, *DEVICES):
        if Path(path).exists():
            readable.append(path)
    root = os.getuid() == 0
    user = kernel.FIRST_USER + os.getpid() if root else os.getuid()
    tasks = kernel.NUM_TASKS
    namespaces = settings["namespaces"] and kernel.leave_namespaces()
    own_root = False
    if namespaces:
        try:
            kernel.enter_own_root(directory, readable, OWN_DIRECTORY, user)
            directory, own_root = OWN_DIRECTORY, True
        except OSError as error:
            raise kernel.NoSandbox(f"a file system of its own can't be made: {error}") from error
    elif root:
        os.chown(directory, user, user)
    else:
        tasks += kernel.tasks_of_user()
    os.chdir(directory)
    kernel.no_new_privileges()
    if root:
        user = kernel.leave_root(user)
    if namespaces:
        kernel.drop_capabilities()
    Path("program.py").write_bytes(program)
    os.environ["HOME"] = directory
    if not os.access(os.__file__, os.R_OK):
        raise kernel.NoSandbox(
            f"{sys.base_prefix} can't be read by another user than root, and name spaces are not "
            "allowed here: install Python where everybody may read it"
        )
    kernel.limit(math.ceil(settings["timeout_s"]) + 1, settings["memory_mb"] * 2**20, tasks)
    version = kernel.landlock(readable, [".", *DEVICES])
    kernel.seccomp()
    return {"landlock": version, "seccomp": True, "namespaces": own_root, "user": user}


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["mode"] == "run":
        import runpy
    else:
        import judging
    report = settings["report"]
    try:
        layers = shut_in(settings)
    except (kernel.NoSandbox, OSError) as error:
        os.write(report, json.dumps({"error": str(error)}).encode())
        os._exit(1)
    os.write(report, json.dumps(layers).encode())
    os.close(report)
    sys.argv = ["program.py"]
    sys.path.remove(HERE)
    sys.path += settings["packages"]
    for name in ("kernel", "judging"):
        sys.modules.pop(name, None)
    match settings["mode"]:
        case "run":
            runpy.run_path("program.py", run_name="__main__")
        case "serve":
            judging.serve(settings["reads"], settings["writes"])
        case "judge":
            judging.judge(settings["reads"], settings["writes"], settings["verdict"])


if __name__ == "__main__":
    main()
