#!/bin/bash
# Runs before a container's command: starts Xvfb if it is installed and no display is set, and logs in to W&B if a key
# is set. The key is never printed.
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
  # Read from the environment: other processes could see an argument.
  python -c "import wandb; wandb.login()" > /dev/null 2>&1 \
    || echo "warning: W&B did not accept WANDB_API_KEY; the run continues without W&B" >&2
fi

exec "$@"
