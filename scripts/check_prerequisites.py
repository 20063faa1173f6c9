"""Says what this machine lacks to install Countersign, before anything is installed.

Checks, in this order: Linux; a supported Python with ``venv``, ``pip`` and its C headers; a C compiler; and
``gmp.h``, which a dependency of the network library (``fastecdsa``) is compiled against. For each thing that is
missing it names the package that brings it on Debian and on Fedora, and exits 1.

Needs nothing but the standard library, and is written to be read by Pythons too old for the rest of the
project: one of those must still be able to say so.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

SUPPORTED_PYTHONS = ((3, 11), (3, 12))
COMPILE_TIMEOUT_SECONDS = 60

PACKAGES = {
    "python": ("python3.11", "python3.11"),
    "venv": ("python3-venv", "python3"),
    "headers": ("python3-dev", "python3-devel"),
    "compiler": ("build-essential", "gcc"),
    "gmp": ("libgmp-dev", "gmp-devel"),
}
"""What brings each thing: on Debian, on Fedora."""

GMP_PROGRAM = """#include <gmp.h>
int main(void) { mpz_t number; mpz_init(number); mpz_clear(number); return 0; }
"""


def find_compiler():
    """Path of the C compiler that a build will use (``CC``, else ``cc``, ``gcc``, ``clang``); None if there is none."""
    named = os.environ.get("CC", "").split()
    for name in named[:1] or ["cc", "gcc", "clang"]:
        path = shutil.which(name)
        if path:
            return path
    return None


def compiles(compiler, program, *libraries):
    """Whether ``program`` compiles and links: it does, or the output of the compiler says why not."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "program.c")
        with open(source, "w") as file:
            file.write(program)
        command = [compiler, source, "-o", os.path.join(folder, "program"), *libraries]
        try:
            finished = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMPILE_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return finished.returncode == 0


def has_module(name):
    """Whether this Python can import ``name``."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def missing():
    """What is missing, as (key of ``PACKAGES`` or None, sentence), in the order in which to put it right."""
    found = []
    if not sys.platform.startswith("linux"):
        found.append((None, f"Countersign runs on Linux; this is {sys.platform}"))
    version = sys.version_info[:2]
    if version not in SUPPORTED_PYTHONS:
        supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
        here = f"{sys.executable} is {version[0]}.{version[1]}"
        found.append(("python", f"Python {supported} is needed; {here} (choose one: make PYTHON=...)"))
    if not (has_module("venv") and has_module("ensurepip")):
        found.append(("venv", "this Python cannot make virtual environments (modules venv and ensurepip)"))
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        found.append(("headers", "the C headers of this Python (Python.h) are missing"))
    compiler = find_compiler()
    if compiler is None:
        found.append(("compiler", "there is no C compiler (cc, gcc or clang)"))
        found.append(("gmp", "gmp.h cannot be looked for without a C compiler; install it along with one"))
    elif not compiles(compiler, "int main(void) { return 0; }\n"):
        found.append(("compiler", f"the C compiler {compiler} cannot compile an empty program"))
    elif not compiles(compiler, GMP_PROGRAM, "-lgmp"):
        found.append(("gmp", "the GNU multiple precision library (gmp.h) is missing"))
    return found


def main():
    """Print what is missing and how to get it. Exit status: 0 if nothing is, else 1."""
    found = missing()
    if not found:
        return 0
    print("Countersign cannot be installed here yet:", file=sys.stderr)
    for key, sentence in found:
        print("  - " + sentence, file=sys.stderr)
        if key is not None:
            debian, fedora = PACKAGES[key]
            print(f"      Debian, Ubuntu: apt-get install {debian}", file=sys.stderr)
            print(f"      Fedora:         dnf install {fedora}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
