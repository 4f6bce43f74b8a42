"""`python -m pangu.launch.worker PROGRAM ...` becomes PROGRAM, which dies with the agent that started it.

Without this, workers whose agent was killed would go on holding their devices.
"""

import os
import signal
import sys

from pangu.launch.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    os.execvp(sys.argv[1], sys.argv[1:])
