"""Starting training on one node or many: `pangu launch`.

    job.py         what is to be started
    node.py        one node's supervisor: attempts, restarts, signals
    meeting.py     how the nodes' supervisors find one another, agree on an attempt and notice who is lost
    attempt.py     one attempt on one node, as the supervisor sees it
    agent.py       the process that attempt.py starts: PyTorch's elastic agent, which torchrun runs
    hosts.py       the same command on every host of a list, over ssh
    rank_table.py  Ascend's rank table

A supervisor imports no torch and outlives every failure of what it supervises.
"""

from pangu.launch.hosts import launch_hosts, parse_hosts, processes_per_host, read_hosts
from pangu.launch.job import Job
from pangu.launch.node import launch_node

__all__ = ["Job", "launch_hosts", "launch_node", "parse_hosts", "processes_per_host", "read_hosts"]
