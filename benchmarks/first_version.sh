#!/usr/bin/env bash
# Train the network of the first version (the one whose growth faded) beside the present one.
#
#     bash benchmarks/first_version.sh DATA_ROOT OUT SEEDS ARM EPOCHS [options of its train_papsmear.py]
#     bash benchmarks/first_version.sh data_herlev outputs/first 3 direct 10 --progressive false --in_channels 3
#
# Clones this repository at the last commit with that network into OUT/code, trains there with its own commands, scores
# the last weights at the original size, and appends a row a training to OUT/first_version.csv. What is there already is
# not trained again. Its history must be at hand (no shallow clone), and python is that of the present environment.
set -euo pipefail

FIRST_VERSION=c11aca436a5b82859adb192f0e18211053b715a2
if [ $# -lt 5 ]; then
    sed -n '2,10p' "$0" >&2
    exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
data=$(realpath "$1"); mkdir -p "$2"; out=$(realpath "$2"); seeds=$3; arm=$4; epochs=$5; shift 5
[ -d "$out/code" ] || git clone --quiet "$project" "$out/code"
git -C "$out/code" fetch --quiet "$project" "$FIRST_VERSION"
git -C "$out/code" checkout --quiet "$FIRST_VERSION"
table=$out/first_version.csv command="$data $epochs $*"
if [ -f "$out/$arm.command" ] && [ "$(cat "$out/$arm.command")" != "$command" ]; then
    echo "error: $out: arm $arm was begun with '$(cat "$out/$arm.command")', asked for is '$command'; their rows would" \
        "not compare. Choose another OUT or ARM" >&2
    exit 2
fi
echo "$command" > "$out/$arm.command"
[ -f "$table" ] || echo "arm,epochs,seed,dice_valid,dice_test,seconds" > "$table"
cd "$out/code"
for ((seed = 0; seed < seeds; seed++)); do
    name=${arm}_$seed
    if grep -q "^$arm,\"$epochs\",$seed," "$table"; then
        echo "$name: trained already, its row is in $table"
        continue
    fi
    begin=$(date +%s)
    python train_papsmear.py --data_root "$data" --epochs_per_stage "$epochs" --seed "$seed" --output_dir "$out/runs" \
        --experiment_name "$name" --overwrite --keep 0 "$@" > "$out/$name.log"
    seconds=$(($(date +%s) - begin))
    for split in valid test; do
        python evaluate_papsmear.py "$out/runs/$name/final_model.pth" --data_root "$data" --split "$split" \
            --out "$out/runs/$name/$split" --overwrite >> "$out/$name.log"
    done
    python - "$out/runs/$name" "$arm,\"$epochs\",$seed" "$seconds" "$table" <<'PYTHON'
import json, sys
from pathlib import Path
run, row, seconds, table = sys.argv[1:]
dice = [json.loads((Path(run) / split / "summary.json").read_text())["scores"]["dice"]["mean"]
        for split in ("valid", "test")]
with open(table, "a") as file:
    file.write(f"{row},{dice[0]:.6f},{dice[1]:.6f},{seconds}\n")
print(row, *dice)
PYTHON
done
