# shellcheck shell=bash
# shellcheck disable=SC2034  # ARGS, COMMAND and others are read by the launchers
# Shared by the launchers: their arguments, how many processes, which addresses, and how the command is shown. Sourced, not run.

SCRIPT="$(basename "$0")"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi

DRY_RUN=""
VERB=train
ARGS=()
SHOWN=() # names of the variables that are set here, for the printed command

fail() { # one line: variable, found, expected
  echo "$SCRIPT: $*" >&2
  exit 2
}

say() {
  echo "$SCRIPT: $1" >&2
}

read_arguments() { # [--dry-run] [VERB] ARGS... -> DRY_RUN, VERB, ARGS
  case "${1:-}" in -h | --help)
    awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"
    exit 0 ;;
  esac
  if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=1
    shift
  fi
  if [[ "${1:-}" =~ ^[a-z]+$ ]]; then
    VERB="$1"
    shift
  fi
  ARGS=("$@")
}

require_modules() { # names: this Python has them
  local missing
  missing="$("$PYTHON" -c 'import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])' "$@")" ||
    fail "PYTHON: found '$PYTHON', which does not run, expected a Python with $*"
  [ -z "$missing" ] || fail "PYTHON: found '$PYTHON' without $missing; run make venv, or name a Python that has it"
}

whole() { # name and least value of a variable that holds a whole number
  if ! [[ "${!1}" =~ ^[0-9]{1,9}$ ]] || [ "${!1}" -lt "$2" ]; then
    fail "$1: found '${!1}', expected a whole number from $2 up"
  fi
}

gpus() { # how many torch sees; it is asked only where a driver is, since importing it takes seconds
  if command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/kfd ]; then
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
  else
    echo 0
  fi
}

count_processes() { # -> NPROC, on this machine
  local found
  case "$VERB" in
    train | eval)
      if [ -n "${NPROC:-}" ]; then
        whole NPROC 1
        return
      fi
      found="$(gpus)"
      NPROC="$((found > 0 ? found : 1))"
      if [ "$found" -gt 0 ]; then
        say "NPROC is not set: $NPROC processes on this machine, one a GPU"
      else
        say "NPROC is not set: 1 process, since torch sees no GPU"
      fi
      ;;
    generate | merge) # several are of use with --strategy fsdp2 only
      NPROC="${NPROC:-1}"
      whole NPROC 1
      ;;
    *)
      NPROC="${NPROC:-1}"
      [ "$NPROC" = 1 ] || fail "NPROC: found '$NPROC', expected 1: $VERB runs on one process"
      [ "${NNODES:-1}" = 1 ] || fail "NNODES: found '$NNODES', expected 1: $VERB runs on one process"
      ;;
  esac
}

count_machines() { # -> NNODES, and for several MASTER_ADDR, MASTER_PORT, NODE_RANK
  NNODES="${NNODES:-1}"
  whole NNODES 1
  if [ "$NNODES" -gt 1 ]; then
    require_master
    [ -n "${NODE_RANK:-}" ] || fail "NODE_RANK: found nothing with NNODES=$NNODES, expected this machine's number, 0 on the first"
    check_node_rank "$NNODES"
  fi
}

require_master() { # -> MASTER_ADDR, MASTER_PORT
  [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR: found nothing with NNODES=$NNODES, expected the first machine's name or address"
  MASTER_PORT="${MASTER_PORT:-29500}"
  whole MASTER_PORT 1
}

check_node_rank() { # number of machines
  whole NODE_RANK 0
  [ "$NODE_RANK" -lt "$1" ] || fail "NODE_RANK: found $NODE_RANK, expected 0 to $(($1 - 1)) with NNODES=$NNODES"
}

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# A machine's name often resolves to 127.0.1.1, or to an interface that the others cannot reach. The one that leads to MASTER_ADDR
# is right in most cases; connecting a datagram socket asks the routing table for it and sends nothing.
find_own_address() { # -> LOCAL_ADDR and GLOO_SOCKET_IFNAME, unless set, and unless they cannot be told
  local found
  found="$("$PYTHON" - "$MASTER_ADDR" "${LOCAL_ADDR:-}" <<'PY'
import socket, sys
import psutil
master, own = sys.argv[1:]
try:
    if not own:
        family, _, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(address)
            own = s.getsockname()[0]
        if own.startswith("127.") and not (master.startswith("127.") or master == "localhost"):
            sys.exit()
    interfaces = psutil.net_if_addrs().items()
    print(own, next((name for name, rows in interfaces if any(row.address == own for row in rows)), ""))
except OSError:
    pass
PY
)"
  LOCAL_ADDR="${found%% *}"
  if [ -n "${GLOO_SOCKET_IFNAME:-}" ] || [ -n "${found#* }" ]; then
    default GLOO_SOCKET_IFNAME "${found#* }"
  fi
}

default() { # name, value: exported, unless it has a value, and shown
  [ -n "${!1:-}" ] || printf -v "$1" %s "$2"
  export "${1?}"
  SHOWN+=("$1")
}

set_threads() { # processes on a machine
  local cores
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  default OMP_NUM_THREADS "$((cores / $1 > 0 ? cores / $1 : 1))"
  default OMP_WAIT_POLICY PASSIVE # threads that wait should sleep: spinning slows a shared machine several times
}

quote() { # variable, word -> the word as a shell would read it back
  if [[ "$2" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf -v "$1" %s "$2"
  else
    printf -v "$1" "'%s'" "${2//\'/\'\\\'\'}"
  fi
}

start() { # the command: shown, then run in place of this shell, so that signals and exit code are the launcher's own
  local name word line=""
  for name in "${SHOWN[@]}"; do
    quote word "${!name}"
    line+="$name=$word "
  done
  for name in "$@"; do
    quote word "$name"
    line+="$word "
  done
  if [ -n "$DRY_RUN" ]; then
    echo "${line% }"
    exit 0
  fi
  echo "${line% }" >&2
  exec "$@"
}
