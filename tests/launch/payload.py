"""What a launched worker does in these tests: `python payload.py FOLDER BEHAVIOUR [RANK]`, without torch.

Every worker leaves FOLDER/rank_R.pid and, at its end, FOLDER/rank_R.ATTEMPT with what it saw of its environment.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, behaviour, *more = sys.argv[1:]
rank = int(os.environ["RANK"])
chosen = more[:1] == [str(rank)]
attempt = os.environ["TORCHELASTIC_RUN_ID"]
(Path(folder) / f"rank_{rank}.pid").write_text(str(os.getpid()))


def finish(code: int) -> None:
    (Path(folder) / f"rank_{rank}.{attempt}").write_text(json.dumps(dict(os.environ)))
    sys.exit(code)


if behaviour == "stop":
    signal.signal(signal.SIGTERM, lambda number, frame: finish(130))
elif behaviour == "die" and chosen:
    os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "raise once" and attempt == "0":
    text = "ValueError: what was asked for" if chosen else "RuntimeError: Connection closed by peer"
    error = {"message": {"message": text, "extraInfo": {"py_callstack": "", "timestamp": "0"}}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error))
    time.sleep(0.5 if chosen else 0)
    finish(1)
elif behaviour == "raise" and chosen:
    finish(1)
elif behaviour == "refuse":
    finish(2)
if behaviour in ("stop", "die", "wait", "raise"):
    print(f"rank {rank} waits", flush=True)
    time.sleep(300)
finish(0)
