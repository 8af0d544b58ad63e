#!/usr/bin/env bash
# Installs what the tests need into .venv, then: ruff, the type checker, the tests. Further words go to pytest.
#   --tests-only   as the first word: without ruff and the type checker
set -euo pipefail
cd "$(dirname "$0")/.."
. example_scripts/environment.sh "[dev]"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ "${1:-}" = --tests-only ]; then
    shift
else
    echo "1 of 2: ruff and the type checker, one minute"
    ruff check .
    ruff format --check .
    bash tests/types.sh
    echo "2 of 2: the tests: all of them take some 15 minutes on 2 idle cores. A dot is a test; how far it is stands at the right"
fi
# Two files of tests at a time: much of what they do is to wait for deadlines.
python -m pytest -q -n 2 --dist loadfile "$@"
