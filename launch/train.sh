#!/usr/bin/env bash
# Trains on all GPUs of this node, or of several nodes: launch/train.sh <strategy> experiment=... key=value
# `anyflow launch <strategy> ...` runs this script from an installed package.
#   strategy: a file of this folder without .yaml, for example zero2. It only decides how tensors are distributed.
#   NPROC: number of processes on this node (default: its GPUs, or 1 if it has none).
#   Several nodes: start the same command on each, with NNODES, NODE_RANK (from 0), MASTER_ADDR and MASTER_PORT.
# Exit codes: 0; 2 (user mistake, reported before the launch if possible); 75 (stopped by SIGUSR1: start it again).
# SIGTERM, SIGHUP and Ctrl-C save and stop with 0. Uses the active environment if it has anyflow_train, or creates .venv.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

strategies() { for file in "$root"/launch/*.yaml; do basename "$file" .yaml; done | paste -sd ' ' -; }

gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv -e '^$' -e '^-1$'
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU'
  fi
}

number() { [[ $2 =~ ^[0-9]+$ ]] || fail "$1 is '$2', which is not a number"; }

strategy=${1:-}
[ -n "$strategy" ] || fail "which strategy? launch/train.sh <strategy> experiment=... (strategies: $(strategies))"
[ -f "$root/launch/$strategy.yaml" ] || fail "strategy: '$strategy' is not one of: $(strategies)"
shift

nodes=${NNODES:-1} node=${NODE_RANK:-0} processes=${NPROC:-$(gpus)}
number NNODES "$nodes"
number NODE_RANK "$node"
number NPROC "$processes"
[ "$processes" -gt 0 ] || processes=1
[ "$node" -lt "$nodes" ] || fail "NODE_RANK is $node, but NNODES=$nodes: nodes count from 0"
world=$((nodes * processes))
if [ "$nodes" -gt 1 ]; then
  [ -n "${MASTER_ADDR:-}" ] && [ -n "${MASTER_PORT:-}" ] || fail "NNODES=$nodes needs MASTER_ADDR and MASTER_PORT"
  [ "$MASTER_PORT" != 0 ] || fail "MASTER_PORT is 0, but the nodes need the same port: name one"
  place=(--machine_rank "$node" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
else
  place=(--main_process_port "${MASTER_PORT:-0}") # 0: any free port
fi
if [ "$strategy" = single ] && [ "$world" -gt 1 ]; then
  [ -z "${NPROC:-}" ] && [ "$nodes" -eq 1 ] || fail "strategy: 'single' is one process, not $world"
  processes=1 world=1
fi
# Accelerate refuses MULTI_GPU with one process.
[ "$strategy" = ddp ] && [ "$world" -eq 1 ] && strategy=single

if ! python -c 'import anyflow_train' 2>/dev/null; then
  [ -z "${SLURM_JOB_ID:-}" ] || fail "python on $(hostname) has no anyflow_train; nothing is installed on nodes: install it on a disk that all nodes see, and load that environment"
  here=$PWD
  cd "$root" || exit 1
  prepare_environment
  cd "$here" || exit 1 # paths in the config are relative to the folder where this script was started
fi
cores=$(nproc 2>/dev/null || echo 1)
threads=$((cores / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 16 ? 16 : threads))}

# Report mistakes in the config here, once, instead of below the launcher's own output.
WORLD_SIZE=$world python -m anyflow_train check "$@" >/dev/null || {
  code=$?
  [ $# -gt 0 ] || python -m anyflow_train train # shows examples
  exit "$code"
}

# The processes write their pids and exit codes to this folder (see `launched` in anyflow_train/training).
ANYFLOW_LAUNCH=$(mktemp -d) || exit 1
export ANYFLOW_LAUNCH
trap 'rm -rf "$ANYFLOW_LAUNCH"' EXIT
echo $$ >"$ANYFLOW_LAUNCH/launcher"

# Send signals to the processes directly: the launcher would kill those that need long to save, and exit with 1.
caught=
# shellcheck disable=SC2329 # the traps below call it
pass_on() {
  caught=$1
  local process
  if [ -s "$ANYFLOW_LAUNCH/processes" ]; then
    while read -r process; do kill -s "$1" "$process" 2>/dev/null; done <"$ANYFLOW_LAUNCH/processes"
  else
    kill -s TERM "$launcher" 2>/dev/null
  fi
}
for signal in TERM INT HUP USR1; do
  # shellcheck disable=SC2064 # expand $signal now, not when the trap runs
  trap "pass_on $signal" "$signal"
done

# Start the launcher in a separate session, so that Ctrl-C reaches this script first. The timeout gives the
# processes time to save if a signal reaches the launcher anyway.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
setsid python -m accelerate.commands.launch --config_file "$root/launch/$strategy.yaml" \
  --num_processes "$world" --num_machines "$nodes" "${place[@]}" -m anyflow_train train "$@" &
launcher=$!

while true; do
  caught=
  wait "$launcher"
  code=$?
  [ -n "$caught" ] || break # otherwise a signal ended the wait
done
left=$(sort -n "$ANYFLOW_LAUNCH/codes" 2>/dev/null | tail -n 1)
exit "${left:-$code}"
