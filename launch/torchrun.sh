#!/usr/bin/env bash
# Start lora-dist under torchrun, on one machine or many:
#   launch/torchrun.sh [--dry-run] [VERB] ARGS...      VERB: train (the default), eval, generate, merge, ...
#   NPROC=2 launch/torchrun.sh --config my.yaml --train.learning_rate 3e-4
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config my.yaml        # on node0; NODE_RANK=1 on the other
# The command is printed, then run; --dry-run prints it only. Variables, all optional on one machine:
#   PYTHON           default: .venv of this checkout, else python3
#   NPROC            processes on this machine; default: the GPUs that torch sees, else 1
#   OMP_NUM_THREADS  default: cores / NPROC
#   OMP_WAIT_POLICY  default: PASSIVE
#   NNODES           machines: a number, or MIN:MAX for as many as are there; default: 1
#   NODE_RANK        this machine's number; 0 holds the rendezvous. Unset: torchrun tells by MASTER_ADDR which machine holds it
#   MASTER_ADDR      name or address of the machine that holds the rendezvous; needed with NNODES
#   MASTER_PORT      its port; default: 29500
#   RDZV_ID          the same on all machines, another for every run at the same MASTER_ADDR:MASTER_PORT; default: lora_dist
#   LOCAL_ADDR       address under which the others reach this machine; default: that of the interface that leads to MASTER_ADDR
#   GLOO_SOCKET_IFNAME  the interface itself, for collectives on CPUs; default: the one that has LOCAL_ADDR
#   MAX_RESTARTS     how often torchrun starts all processes anew after a failure (add --resume auto); default: 0
set -euo pipefail

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_arguments "$@"
require_modules lora_dist torch
NNODES="${NNODES:-1}"
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES: found '$NNODES', expected a number of machines or MIN:MAX"
count_processes
set_threads "$NPROC"

COMMAND=("$PYTHON" -m torch.distributed.run)
if [ "$NNODES" = 1 ]; then
  COMMAND+=(--standalone)
else
  require_master
  find_own_address
  COMMAND+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-lora_dist}")
  if [ -n "${NODE_RANK:-}" ]; then
    check_node_rank "${NNODES#*:}"
    # Told, not guessed: torchrun compares MASTER_ADDR with what this machine's name resolves to, which fails on several networks.
    COMMAND+=(--rdzv-conf "is_host=$((NODE_RANK == 0))")
  fi
  [ -z "$LOCAL_ADDR" ] || COMMAND+=(--local-addr "$LOCAL_ADDR")
fi
if [ -n "${MAX_RESTARTS:-}" ]; then
  whole MAX_RESTARTS 0
  COMMAND+=(--max-restarts "$MAX_RESTARTS")
fi
start "${COMMAND[@]}" --nproc-per-node "$NPROC" -m lora_dist "$VERB" "${ARGS[@]}"
