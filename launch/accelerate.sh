#!/usr/bin/env bash
# Start lora-dist under accelerate launch, on one machine or many:
#   launch/accelerate.sh [--dry-run] [VERB] ARGS...      VERB: train (the default), eval, generate, merge, ...
#   NPROC=2 launch/accelerate.sh --config my.yaml --train.learning_rate 3e-4
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/accelerate.sh --config my.yaml      # on node0; NODE_RANK=1 on the other
# The command is printed, then run; --dry-run prints it only. Variables, all optional on one machine:
#   PYTHON           default: .venv of this checkout, else python3
#   NPROC            processes on this machine; default: the GPUs that torch sees, else 1
#   OMP_NUM_THREADS  default: cores / NPROC
#   OMP_WAIT_POLICY  default: PASSIVE
#   NNODES           machines; default: 1
#   NODE_RANK        this machine's number, from 0; needed with NNODES
#   MASTER_ADDR      name or address of machine 0; needed with NNODES
#   MASTER_PORT      its port; default: 29500 (one machine: a free one)
#   GLOO_SOCKET_IFNAME  interface for collectives on CPUs; default: the one that leads to MASTER_ADDR
#   ACCELERATE_CONFIG   file of `accelerate config`; what the variables above say overrides it. Default: launch/accelerate.yaml,
#                    which asks for processes and nothing else; the file in the user's cache is never read
set -euo pipefail

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_arguments "$@"
require_modules lora_dist accelerate
COMMAND=("$PYTHON" -m accelerate.commands.launch)
# No --cpu where there is no GPU: accelerate would start one process, whatever their number, and DeepSpeed would be left out.
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  [ -f "$ACCELERATE_CONFIG" ] || fail "ACCELERATE_CONFIG: found no file '$ACCELERATE_CONFIG', expected one of accelerate config"
  COMMAND+=(--config_file "$ACCELERATE_CONFIG")
  [ -z "${NPROC:-}" ] || count_processes
else
  COMMAND+=(--config_file "$ROOT/launch/accelerate.yaml")
  count_processes
fi
if [ -n "${NPROC:-}" ]; then
  set_threads "$NPROC"
  NNODES="${NNODES:-1}"
fi
if [ -n "${NNODES:-}" ]; then
  count_machines
  [ -z "${NPROC:-}" ] || COMMAND+=(--num_processes "$((NPROC * NNODES))")
  COMMAND+=(--num_machines "$NNODES")
  if [ "$NNODES" -gt 1 ]; then
    find_own_address
    COMMAND+=(--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
  else
    COMMAND+=(--main_process_port "${MASTER_PORT:-0}") # 0: a free one
  fi
fi
start "${COMMAND[@]}" -m lora_dist "$VERB" "${ARGS[@]}"
