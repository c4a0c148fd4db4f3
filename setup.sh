#!/usr/bin/env bash
# bash setup.sh          create .venv and install everything, the command `cxr` included
# bash setup.sh demo     the same, then run all solutions on the embedded sample, to submissions and report pages
# bash setup.sh test     the same with the development packages, then lint and test (more arguments go to pytest)
# bash setup.sh --cpu [install|demo|test]   the same with PyTorch for CPUs, from PyTorch's own index
# Repeated calls do only what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
unset PYTHONDONTWRITEBYTECODE  # if set, every process compiles all of torch again: many seconds each

fail() { echo "error: $*" >&2; exit 2; }

cpu=""
if [ "${1:-}" = --cpu ]; then cpu=-cpu; shift; fi
what="${1:-install}"
case "$what" in
  install|demo|test) shift || true ;;
  *) fail "'$what' is not one of: install, demo, test, each also after --cpu" ;;
esac

wanted=requirements.txt
[ "$what" = test ] && wanted=requirements-dev.txt
# one stamp per list of packages: no network access while nothing has changed
stamp=".venv/.installed-$(cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)-${wanted%.txt}$cpu"
size="about 3.5 GB to download, 6.5 GB on disk, most of it PyTorch with CUDA" need=7
if [ -n "$cpu" ]; then size="about 1 GB to download, 2.5 GB on disk" need=3; fi
torch=(.venv/lib/python3*/site-packages/torch)
if [ ! -f "$stamp" ] && [ ! -e "${torch[0]}" ]; then
  free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
  [ "$free" -ge "$need" ] || fail "the packages need $need GB in $PWD, which has $free GB left"
fi

recent='import sys; sys.exit(sys.version_info < (3, 11))'
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then  # no environment, or an incomplete one
  python=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$recent" 2>/dev/null; then python="$candidate"; break; fi
  done
  [ -n "$python" ] || fail "Python 3.11 or newer is needed, found: $(python3 --version 2>/dev/null || echo none)"
  "$python" -m venv --clear .venv ||
    fail "$python cannot create environments; on Debian and Ubuntu: apt install python3-venv"
fi
.venv/bin/python -c "$recent" || fail ".venv holds $(.venv/bin/python --version), 3.11 or newer is needed: remove it"
python=.venv/bin/python

# Run an installer silently; if it fails, say why in one line and keep its messages.
install() {
  local log=.venv/install.log
  "$python" -m "$@" >"$log" 2>&1 && return
  if grep -qiE 'no space left|disk quota' "$log"; then
    fail "the disk is full: the packages need $need GB (all messages: $log)"
  elif grep -qiE 'dns|connect|error sending request|timed out|failed to fetch|no matching distribution' "$log"; then
    local index="the package index"
    [ -z "$cpu" ] || index="the package index, or PyTorch's index of CPU packages,"
    fail "$index cannot be reached; nothing was installed (all messages: $log)"
  fi
  fail "$(grep -m1 -E '[a-z]' "$log" || echo "$*") (all messages: $log)"
}

if [ ! -f "$stamp" ]; then
  "$python" -m uv --version >/dev/null 2>&1 || install pip install --quiet --disable-pip-version-check uv
  echo "installing $wanted into .venv: $size …"
  if [ -z "$cpu" ] && [ ! -e "${torch[0]}" ] && [ ! -e /proc/driver/nvidia/version ]; then
    echo "no NVIDIA driver found: 'bash setup.sh --cpu' would install the smaller PyTorch for CPUs"
  fi
  # the option sends torch and torchvision to PyTorch's index, which has builds that belong together
  install uv pip install --quiet --python "$python" -r "$wanted" ${cpu:+--torch-backend cpu}
  touch "$stamp"
fi
if [ ! -x .venv/bin/cxr ]; then  # editable, with the setuptools just installed
  install uv pip install --quiet --python "$python" --no-deps --no-build-isolation -e .
fi

case "$what" in
  install) echo "ready: source .venv/bin/activate, then cxr --help" ;;
  demo) exec "$python" -m solutions demo "$@" ;;
  test)
    "$python" -m ruff check --quiet .
    "$python" -m ruff format --quiet --check .
    .venv/bin/codespell
    # one thread each, since threads would only wait for one another; one process more than there are cores, up to 8,
    # since some tests wait for servers and clocks
    workers=$(($(getconf _NPROCESSORS_ONLN) + 1))
    OMP_NUM_THREADS=1 exec "$python" -m pytest -n $((workers < 8 ? workers : 8)) --dist loadfile "$@" ;;
esac
