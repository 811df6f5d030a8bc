#!/usr/bin/env bash
# Every further machine: HEAD=10.0.0.1 cluster/templates/worker.sh [options of ray start]
# The same requirements (make install) and the head's ~/.ray/auth_token must be there first. Stop it with Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=/dev/null
source .venv/bin/activate

: "${HEAD:?set HEAD to the address of the head}"
test -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" || { echo "no token: copy ~/.ray/auth_token from $HEAD"; exit 1; }
export RAY_AUTH_MODE=token
export RAY_free_objects_period_milliseconds=0   # memory of dropped batches is reused at once (cluster/connect.py)
exec ray start --block --disable-usage-stats --address="$HEAD:${PORT:-6379}" --metrics-export-port="${METRICS_PORT:-8080}" "$@"
