#!/usr/bin/env bash
# The first machine of a cluster, by hand: ADDRESS=10.0.0.1 cluster/templates/head.sh [options of ray start]
# Without ADDRESS it listens on the loopback interface only, which is enough for one machine. Run it from the checkout: jobs use
# the Python environment that the head was started in. Stop it with Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=/dev/null
source .venv/bin/activate

export RAY_AUTH_MODE=token
export RAY_free_objects_period_milliseconds=0   # memory of dropped batches is reused at once (cluster/connect.py)
ray get-auth-token --generate >/dev/null   # keeps the one in ~/.ray/auth_token if there is one
if [[ -z "${ADDRESS:-}" ]]; then
    ADDRESS=127.0.0.1
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0   # the switch by which all of Ray's processes bind to loopback
fi
exec ray start --head --block --disable-usage-stats --node-ip-address="$ADDRESS" --port="${PORT:-6379}" \
    --dashboard-host=127.0.0.1 --dashboard-port="${DASHBOARD_PORT:-8265}" --metrics-export-port="${METRICS_PORT:-8080}" "$@"
