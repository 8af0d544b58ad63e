#!/usr/bin/env bash
# Fine-tune Llama-2-7b (32 layers) with 4 stages × 1 replica = 4 GPUs: one process a GPU.
# A GPU holds 1.7 billion parameters at 18 bytes each (bf16 and fp32 copy, gradient, moments): 30 GB, and activations.
#
# Once, cut the model by layer:
#   python converters/convert_from_hf_llama.py --model-name meta-llama/Llama-2-7b-hf --save-dir pretrained_models
#
# All GPUs on this host:
#   TASKS=a.jsonl:0.6,b.jsonl:0.4 bash example_scripts/finetune_llama.sh
#
# On hosts far apart: run it on each, with the address of rank 0's host, the first rank of this one and the interface
# through which this host reaches the others. Rank r is stage r mod STAGES of replica r div STAGES, so consecutive
# ranks are neighbours in a pipeline. Here the pipeline crosses the distance once.
#   host A:  MASTER=10.0.0.1 NET_INTERFACE=eth0 FIRST_RANK=0 RANKS_HERE=2 TASKS=… bash …/finetune_llama.sh
#   host B:  MASTER=10.0.0.1 NET_INTERFACE=ens3 FIRST_RANK=2 RANKS_HERE=2 bash …/finetune_llama.sh
#
# Every variable below can be set from outside; launch.sh tells the rest. Further words go to dist_train.py as they are:
#   TASKS=… bash example_scripts/finetune_llama.sh --pp-mode 1f1b --pp-ahead 2
set -euo pipefail

MODEL=${MODEL:-pretrained_models/meta-llama_Llama-2-7b-hf} # layer shards; a host needs only the files of its own stages
TOKENIZER=${TOKENIZER:-$MODEL}
TASKS=${TASKS:-}                                           # files and weights, or a tasks.json; rank 0's host alone needs them
CKPT=${CKPT:-checkpoints/llama}                      # a run goes on from the latest checkpoint in here

STAGES=${STAGES:-4}
REPLICAS=${REPLICAS:-1}
LAYER_SPLIT=${LAYER_SPLIT:-}       # layers on each stage, such as 8,8,8,8; empty: by their work
DIST_BACKEND=${DIST_BACKEND:-gloo} # carries activations
DP_BACKEND=${DP_BACKEND:-gloo}     # carries gradients between replicas
LOGS=${LOGS:-$CKPT/logs}

LR=${LR:-1e-5}
TOTAL_STEPS=${TOTAL_STEPS:-20000} # accumulation steps
WARMUP_STEPS=${WARMUP_STEPS:-10}
CHECKPOINT_STEPS=${CHECKPOINT_STEPS:-1000}
SEQ_LENGTH=${SEQ_LENGTH:-2048}
BATCH_SIZE=${BATCH_SIZE:-32}      # sequences of each replica in an accumulation step
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
ACCUMULATE=${ACCUMULATE:-1}
LOG_BACKEND=${LOG_BACKEND:-print} # or wandb, with WANDB_NAME

. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

farspan_tasks # sets farspan_data

farspan_launch \
    --model-name "$MODEL" --tokenizer-name "$TOKENIZER" --model-type llama \
    --layer-split "$LAYER_SPLIT" --dist-backend "$DIST_BACKEND" --dp-backend "$DP_BACKEND" \
    "${farspan_data[@]}" --seq-length "$SEQ_LENGTH" \
    --batch-size "$BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" --gradient-accumulate-step "$ACCUMULATE" \
    --optimizer adamw --lr "$LR" --total-steps "$TOTAL_STEPS" --warmup-steps "$WARMUP_STEPS" --bf16 \
    --checkpoint-path "$CKPT" --checkpoint-steps "$CHECKPOINT_STEPS" \
    --train-log-backend "$LOG_BACKEND" --project-name farspan \
    "$@"
