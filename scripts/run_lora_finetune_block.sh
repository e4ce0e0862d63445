#!/usr/bin/env bash
# Recover a block-pruned model with block-masked LoRA. Every variable can be set from outside:
#   PRUNED_MODEL=my/model DATASET=text.txt NPROC=2 ./scripts/run_lora_finetune_block.sh [more options of lora-dist train]
set -euo pipefail

PRUNED_MODEL="${PRUNED_MODEL:-out/llama2_7b/block_16x16/wanda/pruned_model}"
CONFIG_NAME="${CONFIG_NAME:-meta-llama/Llama-2-7b-hf}" # used only if the model directory has no config or tokenizer of its own
DATASET="${DATASET:-wikitext}"
DATASET_CONFIG="${DATASET_CONFIG:-wikitext-2-raw-v1}"  # wikitext only
OUTPUT_DIR="${OUTPUT_DIR:-out/llama2_7b/block_16x16/wanda/lora_weights_$(basename "${DATASET%%,*}")}"
NUM_EPOCHS="${NUM_EPOCHS:-1}"
BLOCK_SIZE="${BLOCK_SIZE:-1024}"                       # context length in tokens, not the pruning tile
MAX_TRAIN_SAMPLES="${MAX_TRAIN_SAMPLES:-30000}"
MAX_EVAL_SAMPLES="${MAX_EVAL_SAMPLES:-128}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
BATCH_SIZE="${BATCH_SIZE:-1}"
EVAL_BATCH_SIZE="${EVAL_BATCH_SIZE:-8}"
GRADIENT_ACCUMULATION="${GRADIENT_ACCUMULATION:-1}"
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-false}"
LORA_R="${LORA_R:-8}"
LORA_ALPHA="${LORA_ALPHA:-16}"
LORA_DROPOUT="${LORA_DROPOUT:-0.05}"
LORA_TARGET_MODULES="${LORA_TARGET_MODULES:-q_proj,v_proj}"
NPROC="${NPROC:-}"                                     # processes; default: the GPUs, else 1
RESUME_CHECKPOINT="${RESUME_CHECKPOINT:-}"             # a checkpoint folder, or auto
WANDB_PROJECT="${WANDB_PROJECT:-}"

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common.sh
. "$HERE/common.sh"

echo "========================================"
echo "LoRA Fine-tuning Configuration"
echo "========================================"
echo "Pruned model: $PRUNED_MODEL"
if [ -f "$PRUNED_MODEL/config.json" ]; then
  echo "Config: the model directory's own"
else
  echo "Config: $CONFIG_NAME"
fi
echo "Output directory: $OUTPUT_DIR"
echo "Dataset: $DATASET"
echo "Training samples: $MAX_TRAIN_SAMPLES"
echo "Learning rate: $LEARNING_RATE"
echo "Block size: $BLOCK_SIZE"
echo "Epochs: $NUM_EPOCHS"
echo "========================================"
echo
require_model "$PRUNED_MODEL"
echo "✅ Pruned model found"
echo
echo "🚀 Starting LoRA fine-tuning..."
echo

ARGS=(
  --model_name_or_path "$PRUNED_MODEL" --config_name "$CONFIG_NAME" --dataset_name "$DATASET"
  --num_train_epochs "$NUM_EPOCHS" --block_size "$BLOCK_SIZE"
  --per_device_train_batch_size "$BATCH_SIZE" --per_device_eval_batch_size "$EVAL_BATCH_SIZE"
  --gradient_accumulation_steps "$GRADIENT_ACCUMULATION" --do_train --do_eval
  --max_train_samples "$MAX_TRAIN_SAMPLES" --max_eval_samples "$MAX_EVAL_SAMPLES"
  --learning_rate "$LEARNING_RATE" --overwrite_output_dir --output_dir "$OUTPUT_DIR"
  --logging_steps 10 --eval_steps 200 --save_steps 500 --logging_first_step
  --evaluation_strategy steps --save_strategy steps --save_total_limit 3
  --load_best_model_at_end --metric_for_best_model eval_loss
  --gradient_checkpointing "$(truth "$GRADIENT_CHECKPOINTING")"
  --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" --lora_target_modules "$LORA_TARGET_MODULES"
)
[ "$DATASET" = wikitext ] && ARGS+=(--dataset_config_name "$DATASET_CONFIG")
[ -n "$RESUME_CHECKPOINT" ] && ARGS+=(--resume_from_checkpoint "$RESUME_CHECKPOINT")
[ -n "$WANDB_PROJECT" ] && ARGS+=(--wandb_project "$WANDB_PROJECT")

launch "$HERE/finetune_lm.py" "${ARGS[@]}" "$@"
