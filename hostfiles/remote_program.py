"""The shell commands that run a delivered program as root on a host of the user's."""

from __future__ import annotations

AS_ROOT = '[ "$(id -u)" = 0 ] || sudo="sudo -n"; '


def install_command(name: str, source: str) -> str:
    """Runs the program out of the delivery on stdin: nothing needs to be there before.

    `source` says where in the delivery `d` the program's text is.
    """
    loader = (
        "import json, sys; d = json.load(sys.stdin); "
        f'exec(compile(d{source}, "{name}", "exec"), '
        '{"__name__": "__main__", "delivery": d})'
    )
    return f"{AS_ROOT}exec $sudo python3 -c '{loader}' install"


def remove_command(call: str, program: str, aside: str) -> str:
    """Calls the delivered program to undo what it did. Where it is gone, so is all but `aside`."""
    return (
        f"{AS_ROOT}if [ -x {program} ]; then exec $sudo {call}; "
        f"elif [ -e {aside} ]; then exec $sudo rm -rf {aside}; fi"
    )
