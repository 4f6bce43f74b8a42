#!/usr/bin/env bash
# For nodes with nothing but a shell: run the same line on every node, with another NODE_RANK on each.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multi_node.sh train CONFIG --output RUN --resume
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash launch/multi_node.sh train CONFIG --output RUN --resume
#
# RUN and the data must be on storage that all nodes share. NPROC: processes per node (default: its devices).
# MASTER_PORT: free on node 0. MAX_RESTARTS: how often to go on from the newest checkpoint after a failure; a node that
# was lost is started again with its own line. PANGU: the command (default: pangu).
set -euo pipefail
: "${NNODES:?the number of nodes}" "${NODE_RANK:?the number of this node, from 0}" "${MASTER_ADDR:?the address of node 0}"
exec ${PANGU:-pangu} launch ${NPROC:+--nproc "$NPROC"} --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29400}" --max-restarts "${MAX_RESTARTS:-3}" "$@"
