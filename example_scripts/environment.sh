# Sourced by quickstart.sh and tests/run.sh: makes .venv in the checkout, installs farspan into it, activates it.
# Usage: . example_scripts/environment.sh [EXTRAS]      e.g. "[dev]"
farspan_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
farspan_extras=${1:-}

farspan_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "farspan needs Python 3.11 or newer; found none (set PYTHON=/path/to/python3)" >&2
    return 1
}

farspan_environment() {
    local python stamp want
    if [ ! -x "$farspan_root/.venv/bin/pip" ]; then
        python=$(farspan_python) || return 1
        rm -rf "$farspan_root/.venv"
        if ! "$python" -m venv "$farspan_root/.venv" >/dev/null 2>&1; then
            # Debian and Ubuntu keep ensurepip in a package of its own.
            rm -rf "$farspan_root/.venv"
            if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
                apt-get update -qq && apt-get install -y -qq python3-venv || return 1
                "$python" -m venv "$farspan_root/.venv" || return 1
            else
                echo "cannot make a virtual environment: run 'sudo apt-get install python3-venv', then start again" >&2
                return 1
            fi
        fi
    fi
    stamp="$farspan_root/.venv/farspan-installed$farspan_extras"
    want=$(cat "$farspan_root/setup.py" "$farspan_root/pyproject.toml" "$farspan_root/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing farspan$farspan_extras into .venv: once, some minutes, in which pip says what it is at"
        (cd "$farspan_root" && .venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".$farspan_extras") || return 1
        printf '%s' "$want" > "$stamp"
    fi
    . "$farspan_root/.venv/bin/activate"
}

farspan_environment
