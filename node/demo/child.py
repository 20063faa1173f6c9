"""Starts a command that cannot outlive who asked for it: ``python -m node.demo.child PARENT COMMAND ...``.

The kernel is told to kill this process when its parent is gone (``PR_SET_PDEATHSIG``, prctl(2)), then the command
takes its place; the wish survives ``execve``. A parent that died in between is seen by its process id.

Imports next to nothing, because it stands before every start of a node.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Bind this process to the parent's life and become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("whoever asked for this process is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
