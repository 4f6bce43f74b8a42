"""`python launch_payload.py JOB` runs `launch_node` on payload.py; JOB is JSON with the fields of `Job`."""

import json
import sys
from pathlib import Path

from pangu.errors import PanguError
from pangu.launch import Job, launch_node, rank_table

if __name__ == "__main__":
    payload = str(Path(__file__).with_name("payload.py"))
    fields = json.loads(sys.argv[1])
    fields["command"] = tuple(fields["command"])
    if "rank_table" in fields:
        fields["rank_table"] = Path(fields["rank_table"])
        rank_table.HCCN_CONF = Path(fields.pop("hccn_conf"))
    try:
        sys.exit(launch_node(Job(program=(sys.executable, payload), coordinates=lambda rank: f"tp {rank}", **fields)))
    except PanguError as error:
        sys.exit(f"pangu: {error}")
