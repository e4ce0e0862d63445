#!/usr/bin/env bash
# Loss and perplexity of a pruned model with its LoRA weights (WikiText-2 test, unless DATASET says otherwise).
#   PRUNED_MODEL=my/model LORA_WEIGHTS=my/adapter ./scripts/evaluate_lora_block.sh [more options of lora-dist eval]
set -euo pipefail

PRUNED_MODEL="${PRUNED_MODEL:-out/llama2_7b/block_16x16/wanda/pruned_model}"
CONFIG_NAME="${CONFIG_NAME:-meta-llama/Llama-2-7b-hf}" # used only if the model directory has no config or tokenizer of its own
DATASET="${DATASET:-wikitext}"
DATASET_CONFIG="${DATASET_CONFIG:-wikitext-2-raw-v1}"  # wikitext only
OUTPUT_DIR="${OUTPUT_DIR:-out/llama2_7b/block_16x16/wanda/lora_weights_$(basename "${DATASET%%,*}")}"
LORA_WEIGHTS="${LORA_WEIGHTS:-$OUTPUT_DIR}"
BLOCK_SIZE="${BLOCK_SIZE:-1024}"                       # context length in tokens
MAX_EVAL_SAMPLES="${MAX_EVAL_SAMPLES:-}"               # default: all of it
EVAL_BATCH_SIZE="${EVAL_BATCH_SIZE:-8}"
NPROC="${NPROC:-}"                                     # processes; default: the GPUs, else 1

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common.sh
. "$HERE/common.sh"
require_model "$PRUNED_MODEL"

ARGS=(
  --model "$PRUNED_MODEL" --lora_weights "$LORA_WEIGHTS" --config_name "$CONFIG_NAME" --dataset_name "$DATASET"
  --block_size "$BLOCK_SIZE" --batch_size "$EVAL_BATCH_SIZE"
)
[ "$DATASET" = wikitext ] && ARGS+=(--dataset_config_name "$DATASET_CONFIG")
[ -n "$MAX_EVAL_SAMPLES" ] && ARGS+=(--max_samples "$MAX_EVAL_SAMPLES")

launch "$HERE/evaluate_ppl.py" "${ARGS[@]}" "$@"
