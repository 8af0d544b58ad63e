#!/usr/bin/env bash
# The type checker over all rooms. Called by run.sh and by the hook in .pre-commit-config.yaml, with .venv activated.
set -euo pipefail
cd "$(dirname "$0")/.."
# mypy names modules by folder: a link called farspan gives the checkout its package name, whatever the folder is called.
mkdir -p .venv/types && ln -sfn "$PWD" .venv/types/farspan
cd .venv/types
mypy --config-file farspan/pyproject.toml --cache-dir farspan/.mypy_cache \
    -p farspan.comm -p farspan.modules -p farspan.pipeline -p farspan.runtime -p farspan.converters -m farspan.__main__
