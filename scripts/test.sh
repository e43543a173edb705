#!/usr/bin/env bash
# Run every test in .venv (made on first use). Options go to pytest: bash scripts/test.sh -k masking
# The long reliability tests run on demand: bash scripts/test.sh -m slow
# On a GPU: bash scripts/test.sh -m cuda (PYTHON=python3 takes an environment of its own)
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/.."
source scripts/venv.sh
# Tests run in several processes, so each gets one thread.
export OMP_NUM_THREADS=1
# Three for two cores, since some tests wait. Each takes its share of the files in one piece, so that what they share is
# made once, and then from the others'.
parallel=(-n "${PYTEST_WORKERS:-3}" --dist worksteal)
"$PYTHON" -c "import xdist" > /dev/null 2>&1 || { echo "no pytest-xdist: in one process"; parallel=(); }
exec "$PYTHON" -m pytest ${parallel[@]+"${parallel[@]}"} "$@"
