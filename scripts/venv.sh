# shellcheck shell=bash
# Sourced by the other scripts, from the repository root: makes .venv there, or reuses or mends it, and sets
# $PYTHON. Set PYTHON beforehand to use an environment of your own. Needs Python 3.10 or newer.
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$PWD/.venv/bin/python
  wanted=$(cat requirements.txt tests/requirements.txt | sha256sum)
  if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    base=$(command -v python3) || { echo "error: python3 not found; install Python 3.10 or newer" >&2; exit 1; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      { echo "error: $base is older than Python 3.10" >&2; exit 1; }
    # Anew where it was left half-made: Python without pip, or a link to a Python that is gone.
    "$PYTHON" -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear .venv
    echo "Installing the requirements into .venv (about 3 minutes the first time) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
    echo "$wanted" > .venv/installed
  fi
else
  # As seen from where the script was called.
  [[ $PYTHON == */* && $PYTHON != /* ]] && PYTHON=$OLDPWD/$PYTHON
  lacking=$("$PYTHON" -c 'from importlib.util import find_spec
lacking = [name for name in ("torch", "timm") if not find_spec(name)]
print(" and no ".join(lacking))
raise SystemExit(len(lacking))' 2> /dev/null) || {
    echo "error: PYTHON=$PYTHON ${lacking:+has no }${lacking:-is no Python that runs};" \
      "install requirements.txt there, or unset PYTHON" >&2
    exit 1
  }
fi
