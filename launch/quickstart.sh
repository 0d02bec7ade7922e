#!/usr/bin/env bash
# The whole chain on a laptop: clips -> shards -> distillation -> evaluation -> export -> playback by stock diffusers.
# If it was stopped, start it again: finished steps are skipped. RUN=folder sets the output folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
run=${RUN:-runs/quickstart}
# OpenMP's default wait policy: with PASSIVE, the second thread of a quiet machine brings nothing. On a busy machine,
# set OMP_WAIT_POLICY=PASSIVE.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS

step() { printf '\n== %s (at %d s)\n' "$1" $((SECONDS - started)); }

# One set of clips, from video files to shards. Two processes with one thread each are faster than one with two.
make_shards() {
  OMP_NUM_THREADS=1 anyflow clips out="$run/clips/$1" count="$2" seed="$3"
  OMP_NUM_THREADS=1 anyflow prepare experiment=tiny_prepare source="$run/clips/$1" out="$run/shards/$1"
}

step "1/5 clips with captions, then shards of latents and texts"
mkdir -p "$run"
set -m # a process group of its own, which can be ended as a whole
make_shards held_out 288 2 >"$run/held_out.log" 2>&1 &
held_out=$!
set +m
trap 'kill -- "-$held_out" 2>/dev/null || true' EXIT
make_shards train 512 1
wait "$held_out" || { cat "$run/held_out.log" >&2; exit 1; }
tail -n 1 "$run/held_out.log"

step "2/5 distillation (stage 1)"
anyflow train experiment=tiny out="$run" name=student \
  data.shards="$run/shards/train" evaluation.held_out="$run/shards/held_out" engine.threads=2

step "3/5 evaluation of teacher and student"
if [ "$run/report/report.json" -nt "$run/student/done.json" ]; then
  echo "$run/report is newer than the student"
else
  anyflow evaluate experiment=tiny_evaluate models="[$run/student]" held_out="$run/shards/held_out" out="$run/report"
fi

step "4/5 export"
anyflow export model="$run/student" out="$run/pipeline" format=pipeline precision=fp32 overwrite=true

step "5/5 playback by stock diffusers, in a process of its own"
python launch/play.py "$run/pipeline" "$run/playback.gif" "a red ball moving left"

printf '\n'
grep -v '^!\[' "$run/report/report.md"  # without the pictures
printf '\nDone in %d s (without the installation).\n' $((SECONDS - started))
place=$(realpath "$run")
printf '  %-34s %s\n' \
  "page with pictures and all numbers" "$place/report/report.md" \
  "videos of teacher and student" "$place/report/grid.gif" \
  "quality against number of calls" "$place/report/quality.png" \
  "exported pipeline" "$place/pipeline" \
  "played back by stock diffusers" "$place/playback.gif"
