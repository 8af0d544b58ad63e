#!/usr/bin/env bash
# From a fresh machine to a trained model: installs farspan into .venv, makes a corpus and a small GPT-NeoX model from
# what Python itself brings (no network), trains it with 2 stages × 2 replicas on this machine, and shows the result.
#
#   bash example_scripts/quickstart.sh [--fresh] [--steps N]
#
# Run again, it goes on with a run that was stopped, or shows the report of one that is finished.
# --fresh throws the last run away and starts over; --steps N trains up to step N [200].
# All files lie in QUICKSTART_DIR [quickstart, in the checkout].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dir=${QUICKSTART_DIR:-quickstart}
fresh="" steps=""
while (($# > 0)); do
    case $1 in
        --fresh) fresh=yes ;;
        --steps)
            steps=${2:-}
            shift || true
            if ! [[ $steps =~ ^[1-9][0-9]*$ ]]; then
                echo "--steps needs a positive number" >&2
                exit 2
            fi
            ;;
        *)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            [ "$1" = --help ] || [ "$1" = -h ] || exit 2
            exit
            ;;
    esac
    shift
done

. example_scripts/environment.sh ""
. example_scripts/launch.sh
export HF_HUB_OFFLINE=1 # nothing below needs the network, and nothing looks for it
SECONDS=0

title() { printf '\n== %s\n' "$*"; }

if [ -n "$fresh" ]; then
    echo "--fresh: starting over in $dir"
    rm -rf "$dir"/{prepared.json,corpus,hf-gptneox,shards,checkpoints,logs,steps}
fi

title "1. a corpus from Python's standard library, a tokenizer, a small GPT-NeoX model"
python example_scripts/quickstart.py prepare "$dir"

title "2. cut the model by layer"
python converters/convert_from_hf_gptneox.py --model-name "$dir/hf-gptneox" --save-dir "$dir/shards"

done_steps=$(cat "$dir/checkpoints/latest" 2>/dev/null || echo 0)
steps=${steps:-$(cat "$dir/steps" 2>/dev/null || echo 200)}
title "3. train: 2 stages × 2 replicas, 4 processes"
if ((done_steps >= steps)); then
    echo "a finished run of $done_steps steps lies in $dir: nothing to train (--fresh starts over, --steps N goes on)"
else
    if ((done_steps > 0)); then
        echo "resuming the run in $dir after step $done_steps of $steps (--fresh starts over)"
    else
        echo "a new run of $steps steps"
    fi
    STAGES=2 REPLICAS=2 MASTER=127.0.0.1 FIRST_RANK=0 RANKS_HERE=4 NET_INTERFACE=lo LOGS=$dir/logs
    PYTHON=$(command -v python)
    PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    status=0
    farspan_launch \
        --model-name "$dir/shards/hf-gptneox" --tokenizer-name "$dir/hf-gptneox" --model-type gptneox \
        --task-name "$dir/corpus/docstrings.jsonl:0.6,$dir/corpus/source.jsonl:0.4" \
        --checkpoint-path "$dir/checkpoints" --checkpoint-steps 100 --total-steps "$steps" --warmup-steps $((steps < 10 ? steps : 10)) \
        --lr 3e-3 --seq-length 128 --batch-size 4 --micro-batch-size 2 --use-cuda false || status=$?
    if ((status == 75)) || { ((status != 0)) && [ -n "$farspan_stopped" ]; }; then
        echo "stopped; the same command goes on from the last checkpoint in $dir/checkpoints" >&2
    fi
    ((status == 0)) || exit "$status"
fi

title "4. the result, loaded with transformers"
python example_scripts/quickstart.py report "$dir"
echo
echo "all this took $SECONDS s"
