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

step "1/6 clips with captions"
anyflow clips out="$run/clips/train" count=512 seed=1
anyflow clips out="$run/clips/held_out" count=288 seed=2

step "2/6 video and text -> shards of latents"
anyflow prepare experiment=tiny_prepare source="$run/clips/train" out="$run/shards/train"
anyflow prepare experiment=tiny_prepare source="$run/clips/held_out" out="$run/shards/held_out"

step "3/6 distillation (stage 1)"
anyflow train experiment=tiny out="$run" name=student \
  data.shards="$run/shards/train" evaluation.held_out="$run/shards/held_out" engine.threads=2

step "4/6 evaluation of teacher and student"
if [ "$run/report/report.json" -nt "$run/student/done.json" ]; then
  echo "$run/report is newer than the student"
else
  anyflow evaluate experiment=tiny_evaluate models="[$run/student]" held_out="$run/shards/held_out" out="$run/report"
fi

step "5/6 export"
anyflow export checkpoint="$run/student" out="$run/pipeline" format=pipeline precision=fp32 overwrite=true

step "6/6 playback by stock diffusers, in a process of its own"
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
