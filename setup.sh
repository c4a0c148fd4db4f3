#!/usr/bin/env bash
# bash setup.sh          create .venv and install everything, the command `cxr` included
# bash setup.sh demo     the same, then run all solutions on the embedded sample, to submissions and report pages
# bash setup.sh test     the same with the development packages, then lint and test (more arguments go to pytest)
# Repeated calls do only what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
unset PYTHONDONTWRITEBYTECODE  # if set, every process compiles all of torch again: many seconds each

what="${1:-install}"
case "$what" in
  install|demo|test) shift || true ;;
  *) echo "error: '$what' is not one of: install, demo, test" >&2; exit 2 ;;
esac

recent='import sys; sys.exit(sys.version_info < (3, 11))'
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then  # no environment, or an incomplete one
  python=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$recent" 2>/dev/null; then python="$candidate"; break; fi
  done
  if [ -z "$python" ]; then
    echo "error: Python 3.11 or newer is needed, found: $(python3 --version 2>/dev/null || echo none)" >&2; exit 2
  fi
  "$python" -m venv --clear .venv ||
    { echo "error: $python cannot create environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
fi
if ! .venv/bin/python -c "$recent"; then
  echo "error: .venv holds $(.venv/bin/python --version), 3.11 or newer is needed: remove it" >&2; exit 2
fi
python=.venv/bin/python

wanted=requirements.txt
[ "$what" = test ] && wanted=requirements-dev.txt
# one stamp per list of packages: no network access while nothing has changed
stamp=".venv/.installed-$(cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)-${wanted%.txt}"
if [ ! -f "$stamp" ]; then
  "$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet --disable-pip-version-check uv
  echo "installing $wanted …"
  "$python" -m uv pip install --quiet --python "$python" -r "$wanted"
  touch "$stamp"
fi
if [ ! -x .venv/bin/cxr ]; then  # editable, with the setuptools just installed
  "$python" -m uv pip install --quiet --python "$python" --no-deps --no-build-isolation -e .
fi

case "$what" in
  install) echo "ready: source .venv/bin/activate, then cxr --help" ;;
  demo) exec "$python" -m solutions demo "$@" ;;
  test)
    "$python" -m ruff check --quiet .
    "$python" -m ruff format --quiet --check .
    .venv/bin/codespell
    # one process per core, each on one thread: tests are many and small, and threads would only wait for one another
    OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@" ;;
esac
