#!/bin/bash
# Before the command of a container: a display where there is Xvfb and none is set, and W&B's login where a key is. The key is never printed.
set -euo pipefail

if [ -z "${DISPLAY:-}" ] && command -v Xvfb > /dev/null; then
  Xvfb :99 -screen 0 1024x768x24 -nolisten tcp > /dev/null 2>&1 &
  export DISPLAY=:99
  for _ in $(seq 50); do
    [ -S /tmp/.X11-unix/X99 ] && break
    sleep 0.1
  done
fi

if [ -n "${WANDB_API_KEY:-}" ]; then
  # From the environment, not as an argument, which other processes could see.
  python -c "import wandb; wandb.login()" > /dev/null 2>&1 || echo "W&B did not accept WANDB_API_KEY; the run goes on without" >&2
fi

exec "$@"
