#!/usr/bin/env bash
# Installs what the tests need into .venv, then: ruff, the type checker, the tests. Further words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. example_scripts/environment.sh "[dev]"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

ruff check .
ruff format --check .
# mypy names modules by folder: a link called farspan gives the checkout its package name, whatever the folder is called.
mkdir -p .venv/types && ln -sfn "$PWD" .venv/types/farspan
(cd .venv/types && mypy --config-file farspan/pyproject.toml --cache-dir farspan/.mypy_cache \
    -p farspan.comm -p farspan.modules -p farspan.pipeline -p farspan.runtime -p farspan.converters)
# Two files of tests at a time: much of what they do is to wait for deadlines.
python -m pytest -q -n 2 --dist loadfile "$@"
