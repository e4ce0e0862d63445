# Shared by the shell front ends: which python, how many processes, how to start them. Sourced, not run.

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi

require_model() {
  if [ ! -d "$1" ] || [ -z "$(ls -A "$1" 2>/dev/null)" ]; then
    echo "❌ Pruned model: found no model in '$1', expected a directory with config.json and *.safetensors; set PRUNED_MODEL" >&2
    echo "   (prune one: lora-dist prune MODEL OUT, or scripts/main_block.py)" >&2
    exit 2
  fi
}

truth() { # on, 1, true, yes -> true
  case "${1,,}" in 1 | on | true | yes) echo true ;; 0 | off | false | no | "") echo false ;;
    *) echo "found '$1', expected true or false" >&2; exit 2 ;;
  esac
}

count_processes() { # NPROC, else the GPUs, else 1
  local gpus
  if [ -n "${NPROC:-}" ]; then
    echo "$NPROC"
    return
  fi
  gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
  echo "$((gpus > 0 ? gpus : 1))"
}

launch() { # script and arguments, on count_processes processes
  local n
  n="$(count_processes)"
  if [ "$n" = 1 ]; then
    exec "$PYTHON" "$@"
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / n > 0 ? $(nproc) / n : 1))}"
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$n" "$@"
}
