"""Stops a Python program where a test wants it stopped; nothing of the program is changed for it.

Python runs this text by itself before the program: from a .pth file, or as `sitecustomize`. A
process that is stopped can be looked at, killed, cut off, or let go on, and it is never too late.
One whose state in between needs no look can as well be killed there at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def stop_at(program: str, function: str, about: str, how: str) -> None:
    """Stops this process at the first call of a function of `program` (the end of its path).

    `about`: only at a call in whose arguments this text is. `how`: the signal's name.
    """

    def at_call(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if (
            code.co_name == function
            and code.co_filename.endswith(program)
            and about in repr(frame.f_locals)
        ):
            sys.settrace(None)
            os.kill(os.getpid(), signal.Signals[how])

    threading.settrace(at_call)
    sys.settrace(at_call)
