#!/usr/bin/env bash
# Train every adapter type on a block-pruned model, merge it, and print what docs/adapters.md tabulates.
#   scripts/measure_adapters.sh MODEL TEXT OUT [STEPS]
set -euo pipefail
model=$1 text=$2 out=$3 steps=${4:-60}
PYTHON=${PYTHON:-python}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # beside other work, threads that spin make torch many times slower
cd "$(dirname "$0")/.."
mkdir -p "$out"
[ -d "$out/pruned" ] || "$PYTHON" -m lora_dist prune "$model" "$out/pruned" --sparsity 0.5 --score magnitude >"$out/prune.txt"
for kind in ${KINDS:-lora pissa dora adalora ia3}; do
    options=(--adapter.type="${kind/pissa/lora}")
    [ "$kind" = pissa ] && options+=(--adapter.init_lora_weights=pissa)
    [ "$kind" = adalora ] && options+=(--adapter.tinit=10 --adapter.tfinal=20)
    [ "$kind" = ia3 ] && options+=(--train.learning_rate=3e-2) || options+=(--adapter.lora_dropout=0)
    "$PYTHON" -m lora_dist train --model.name_or_path="$out/pruned" --data.dataset_name="$text" --data.block_size=256 \
        --data.document_separator='<|endoftext|>' --data.special_tokens=bos --data.holdout_windows=100 --train.output_dir="$out/$kind" \
        --train.max_steps="$steps" --train.per_device_train_batch_size=8 --train.per_device_eval_batch_size=8 --train.learning_rate=3e-3 \
        --train.eval_steps="$steps" --train.save_strategy=no --train.load_best_model_at_end=false --train.logging_steps=10 "${options[@]}" >"$out/$kind.txt"
    "$PYTHON" -m lora_dist merge "$out/pruned" "$out/$kind" "$out/$kind-merged" >"$out/$kind-merge.txt"
    "$PYTHON" - "$out" "$kind" <<'PYTHON_END'
import json, re, sys
from pathlib import Path
out, kind = Path(sys.argv[1]), sys.argv[2]
rows = [json.loads(line) for line in (out / kind / "metrics.jsonl").read_text().splitlines()]
count = int(re.search(r"Number of trainable parameters = ([\d,]+)", (out / f"{kind}.txt").read_text())[1].replace(",", ""))
evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
merge = json.loads((out / f"{kind}-merged" / "merge.json").read_text())
print(f"| {kind} | {count:,} | {evals[0]:.3f} | {evals[-1]:.3f} | {merge['logits_error_fp32']:.0e} | {merge['zero_tiles']:,} |", flush=True)
PYTHON_END
done
