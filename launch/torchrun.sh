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
#   RDZV_ENDPOINT    HOST:PORT of a rendezvous that none of these machines holds (lora-dist rendezvous), instead of MASTER_ADDR
#   RDZV_ID          the same on all machines, another for every start at the same address and port; default: lora_dist
#   RDZV_CONF        further settings of the rendezvous, KEY=VALUE,...; with restarts or MIN:MAX, what is not set here is set for quick ones
#   LOCAL_ADDR       address under which the others reach this machine; default: that of the interface that leads to MASTER_ADDR
#   GLOO_SOCKET_IFNAME  the interface itself, for collectives on CPUs; default: the one that has LOCAL_ADDR
#   MAX_RESTARTS     how often torchrun starts all processes anew after a failure (add --resume auto); default: 0
set -euo pipefail

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# A machine is given up 10 s after its last sign of life, and a start waits 5 s for machines above the least number. torchrun's own: 15, 30.
# Machines tell the time of a sign of life by their own clocks, which must not be apart by more than that.
QUICK=keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5,read_timeout=20

find_rendezvous() { # -> MASTER_ADDR, MASTER_PORT, CONF
  if [ -n "${RDZV_ENDPOINT:-}" ]; then
    [[ "$RDZV_ENDPOINT" =~ ^([^:]+|\[[0-9a-fA-F:]+\]):([0-9]+)$ ]] ||
      fail "RDZV_ENDPOINT: found '$RDZV_ENDPOINT', expected HOST:PORT of a lora-dist rendezvous"
    [ -n "${RDZV_ID:-}" ] || fail "RDZV_ID: found nothing with RDZV_ENDPOINT, expected a name that no earlier start has met under there"
    MASTER_ADDR="${BASH_REMATCH[1]}"
    MASTER_PORT="${BASH_REMATCH[2]}"
    CONF=is_host=0
    return
  fi
  require_master
  if [ -n "${NODE_RANK:-}" ]; then
    check_node_rank "${NNODES#*:}"
    # Told, not guessed: torchrun compares MASTER_ADDR with what this machine's name resolves to, which fails on several networks.
    CONF="is_host=$((NODE_RANK == 0))"
  fi
}

read_arguments "$@"
require_modules lora_dist torch
NNODES="${NNODES:-1}"
if ! [[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || [ "${NNODES%%:*}" -gt "${NNODES##*:}" ]; then
  fail "NNODES: found '$NNODES', expected a number of machines, or MIN:MAX with MIN no larger"
fi
count_processes
set_threads "$NPROC"

COMMAND=("$PYTHON" -m torch.distributed.run)
if [ "$NNODES" = 1 ]; then
  COMMAND+=(--standalone)
else
  CONF=""
  find_rendezvous
  find_own_address
  COMMAND+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-lora_dist}")
  [ "${MAX_RESTARTS:-0}" = 0 ] && [[ "$NNODES" != *:* ]] || CONF+="${CONF:+,}$QUICK"
  CONF+="${RDZV_CONF:+${CONF:+,}$RDZV_CONF}" # the last one of a name rules
  [ -z "$CONF" ] || COMMAND+=(--rdzv-conf "$CONF")
  [ -z "$LOCAL_ADDR" ] || COMMAND+=(--local-addr "$LOCAL_ADDR")
fi
if [ "${MAX_RESTARTS:-0}" != 0 ]; then
  whole MAX_RESTARTS 0
  # The processes' own store is torchrun's unless told otherwise, and torchrun keeps it, and on other machines its old address, through a
  # restart: started anew, the processes would meet what the ones before them left, or would not meet at all.
  default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
fi
[ -z "${MAX_RESTARTS:-}" ] || COMMAND+=(--max-restarts "$MAX_RESTARTS")
start "${COMMAND[@]}" --nproc-per-node "$NPROC" -m lora_dist "$VERB" "${ARGS[@]}"
