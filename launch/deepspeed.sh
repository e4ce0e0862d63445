#!/usr/bin/env bash
# Start lora-dist under DeepSpeed's launcher, on one machine or many:
#   launch/deepspeed.sh [--dry-run] [VERB] ARGS...      VERB: train (the default), eval, generate, merge, ...
#   NPROC=2 launch/deepspeed.sh --config my.yaml --parallel.strategy zero3
#   HOSTFILE=hosts launch/deepspeed.sh --config my.yaml --parallel.strategy zero3     # all machines, over ssh
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/deepspeed.sh --config my.yaml       # on node0; NODE_RANK=1 on the other; no ssh
# The command is printed, then run; --dry-run prints it only. Variables, all optional on one machine:
#   PYTHON           default: .venv of this checkout, else python3; with HOSTFILE at the same path on all machines
#   NPROC            processes on this machine; default: the GPUs that torch sees, else 1. HOSTFILE's slots stand in its place
#   OMP_NUM_THREADS  default: cores / NPROC
#   OMP_WAIT_POLICY  default: PASSIVE
#   DS_ACCELERATOR   default: cpu where torch sees no GPU, else left to DeepSpeed
#   MASTER_ADDR      name or address of machine 0; needed with NNODES; default with HOSTFILE: its first host
#   MASTER_PORT      its port; default: 29500 (one machine: a free one)
#   NNODES           machines, where each is started by hand; default: 1
#   NODE_RANK        this machine's number, from 0; needed with NNODES
#   GLOO_SOCKET_IFNAME  interface for collectives on CPUs; default: the one that leads to MASTER_ADDR (with HOSTFILE: none)
#   HOSTFILE         lines "HOST slots=PROCESSES"; DeepSpeed starts all hosts, in this directory, which all must have
#   DS_LAUNCHER      how it reaches them: pdsh (the default, over ssh) or openmpi
#   DS_LAUNCHER_ARGS options for that launcher, in one text
#   DS_SSH_PORT      port of the hosts' ssh servers
#   PDSH_SSH_ARGS_APPEND  other options of ssh, such as -i KEY
set -euo pipefail

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_arguments "$@"
require_modules lora_dist deepspeed

read_hostfile() { # -> HOSTS, SLOTS (the largest)
  local line
  HOSTS=()
  SLOTS=1
  [ -f "$HOSTFILE" ] || fail "HOSTFILE: found no file '$HOSTFILE', expected one with lines 'HOST slots=PROCESSES'"
  while IFS= read -r line || [ -n "$line" ]; do
    [[ "$line" =~ ^[[:space:]]*(#|$) ]] && continue
    [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
      fail "HOSTFILE: found '$line' in $HOSTFILE, expected 'HOST slots=PROCESSES'"
    HOSTS+=("${BASH_REMATCH[1]}")
    SLOTS=$((BASH_REMATCH[2] > SLOTS ? BASH_REMATCH[2] : SLOTS))
  done <"$HOSTFILE"
  [ ${#HOSTS[@]} -gt 0 ] || fail "HOSTFILE: found no host in $HOSTFILE, expected lines 'HOST slots=PROCESSES'"
}

device_ids() { # -> IDS, what a machine's processes may see, as JSON: GPU numbers or names, or -1 for none
  local ids=() i
  if [ "$GPUS" -gt 0 ]; then
    IFS=, read -r -a ids <<<"${CUDA_VISIBLE_DEVICES:-}"
    [ ${#ids[@]} = 0 ] || [ "$NPROC" -le ${#ids[@]} ] ||
      fail "NPROC: found $NPROC, expected ${#ids[@]} at most, the GPUs in CUDA_VISIBLE_DEVICES"
  fi
  IDS=""
  for ((i = 0; i < NPROC; i++)); do
    IDS+="${IDS:+, }\"${ids[i]:-$((GPUS > 0 ? i : -1))}\""
  done
  IDS="[$IDS]"
}

# DeepSpeed's own front end, `deepspeed`, adds nothing where no other machine has to be reached. It does not pass a SIGTERM on, so
# that a stopped run's processes live on, and takes a machine without GPUs for as many processes as it has NUMA nodes.
start_here() {
  local world i
  count_processes
  count_machines
  set_threads "$NPROC"
  GPUS="$(gpus)"
  [ "$GPUS" -gt 0 ] || default DS_ACCELERATOR cpu
  device_ids
  world="\"machine0\": $IDS"
  for ((i = 1; i < NNODES; i++)); do
    world+=", \"machine$i\": $IDS"
  done
  if [ "$NNODES" -gt 1 ]; then
    find_own_address
  else
    NODE_RANK=0
    MASTER_ADDR=127.0.0.1
    MASTER_PORT="${MASTER_PORT:-$(free_port)}"
  fi
  start "$PYTHON" -u -m deepspeed.launcher.launch --world_info "$(echo "{$world}" | base64 | tr -d '\n' | tr '+/' '-_')" \
    --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --no_local_rank --module lora_dist "$VERB" "${ARGS[@]}"
}

# The other hosts know nothing of this shell's variables. Those that decide how processes reach each other and where files lie go
# along through `env`; keys and tokens would show in every list of processes, and have to be in ~/.deepspeed_env instead.
collect_variables() { # -> FORWARDED, as NAME=value
  local name
  FORWARDED=()
  while IFS= read -r name; do
    case "$name" in
      *TOKEN* | *KEY* | *SECRET* | *PASSWORD*) ;;
      OMP_* | GLOO_* | NCCL_* | TORCH_* | HF_* | TRANSFORMERS_* | LORA_DIST_* | WANDB_* | DS_ACCELERATOR)
        FORWARDED+=("$name=${!name}") ;;
    esac
  done < <(compgen -e)
}

quote_for_pdsh() { # REMOTE, word by word: pdsh hands one line of text to a shell, and replaces %h and %n in it
  local i word
  for i in "${!REMOTE[@]}"; do
    word="${REMOTE[i]}"
    if [[ "$word" == *" "* ]]; then
      # DeepSpeed puts a word with a space between quotation marks, and escapes those within it, but nothing else.
      word="${word//\\/\\\\}"
      word="${word//\$/\\\$}"
      word="${word//\`/\\\`}"
    else
      quote word "$word"
    fi
    REMOTE[i]="${word//%/%%}"
  done
}

start_hosts() {
  local ranks options=(--hostfile "$HOSTFILE" --launcher "$DS_LAUNCHER" --force_multi)
  [[ "$VERB" =~ ^(train|eval|generate|merge)$ ]] || fail "HOSTFILE: found '$HOSTFILE', expected none: $VERB runs on one process"
  [ -z "${NPROC:-}" ] || say "NPROC is not used: the slots in $HOSTFILE say how many processes each host starts"
  if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR="${HOSTS[0]}"
    [ "$MASTER_ADDR" != localhost ] || fail "MASTER_ADDR: found nothing, expected the first host's address for the others"
  fi
  MASTER_PORT="${MASTER_PORT:-29500}"
  whole MASTER_PORT 1
  set_threads "$SLOTS"
  collect_variables
  REMOTE=(env "${FORWARDED[@]}" "$PYTHON" -u -m lora_dist "$VERB" "${ARGS[@]}")
  case "$DS_LAUNCHER" in
    pdsh)
      require_command pdsh
      [ -z "${PDSH_SSH_ARGS:-}${PDSH_SSH_ARGS_APPEND:-}" ] || options+=(--no_ssh_check) # the check would not use them
      quote_for_pdsh
      ;;
    openmpi)
      require_command mpirun
      options+=(--no_ssh_check)
      # Open MPI names the ranks its own way, and DeepSpeed would translate them only with mpi4py.
      # shellcheck disable=SC2016  # expanded on the hosts
      ranks='export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK'
      # shellcheck disable=SC2016
      ranks+=' LOCAL_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE; exec "$@"'
      REMOTE=(env "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" bash -c "$ranks" lora_dist "${REMOTE[@]}")
      ;;
    *) fail "DS_LAUNCHER: found '$DS_LAUNCHER', expected pdsh or openmpi" ;;
  esac
  if [ -n "${DS_SSH_PORT:-}" ]; then
    whole DS_SSH_PORT 1
    options+=(--ssh_port "$DS_SSH_PORT")
  fi
  [ -z "${DS_LAUNCHER_ARGS:-}" ] || options+=("--launcher_args=$DS_LAUNCHER_ARGS")
  start "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --no_local_rank --no_python "${REMOTE[@]}"
}

require_command() {
  command -v "$1" >/dev/null || fail "DS_LAUNCHER: found $DS_LAUNCHER but no command $1, expected it installed;" \
    "without it, start each machine by hand with NNODES and NODE_RANK"
}

DS_LAUNCHER="${DS_LAUNCHER:-pdsh}"
if [ -n "${HOSTFILE:-}" ]; then
  read_hostfile
  if [ "${HOSTS[*]}" != localhost ]; then
    start_hosts
  fi
  NPROC="$SLOTS" # localhost alone needs no ssh
fi
start_here
