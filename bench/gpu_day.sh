#!/usr/bin/env bash
# All that is worth measuring on a machine with a GPU, in less than 25 minutes:
#
#     bench/gpu_day.sh
#
# parity with PyTorch, attention, the host's time a layer, then as many models of `compare.py --preset full` as
# the time allows, the fastest first. It runs in the Python environment at hand, with jaxspd's extras `cuda` and
# `reference`. What a part has found is kept: an interrupted day goes on where it was, and a second day measures
# what the first had no time for. Results lie under `bench/results/`, to be committed.
#
# A rehearsal on any machine, with what is smallest: MINUTES=5 PRESET=ci bench/gpu_day.sh

MINUTES=${MINUTES:-24}    # of the whole day
PRESET=${PRESET:-full}    # of compare.py
cd "$(dirname "$0")" || exit 1
begin=$SECONDS
failed=""

left() { echo $((60 * MINUTES - (SECONDS - begin))); }

# part NAME SECONDS COMMAND...: runs the command, for as long as it may and the day lasts.
part() {
    name=$1 most=$2
    shift 2
    most=$((most < $(left) ? most : $(left)))
    if [ "$most" -le 0 ]; then
        failed="$failed $name"
        return
    fi
    echo "== $name, $(left) s left"
    timeout --signal=INT --kill-after=20 "$most" "$@" || failed="$failed $name"
}

# Where a part ends by itself, it begins nothing after two thirds of its time: the last needs time to end.
part attention 120 python attention.py
part dispatch 120 python dispatch.py
part parity $((20 * MINUTES)) python parity.py --minutes "$((MINUTES * 2 / 9))"
part compare "$(left)" python compare.py --preset "$PRESET" --minutes "$(($(left) * 2 / 180))"

echo "== done in $((SECONDS - begin)) s; results to commit:"
git status --short results
[ -z "$failed" ] || echo "not finished:$failed"
[ -z "$failed" ]
