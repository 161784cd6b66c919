#!/usr/bin/env bash
# From nothing to a trained and evaluated model: sets up an environment (environment.sh lists its variables), generates a
# small corpus and an untrained tiny model, and trains it with DeepSpeed on two ranks. It needs no GPU, no compiler and no
# network beyond the package index. A second run finds everything done; further flags go to `qa-deepspeed train`
# (--overwrite_output_dir trains again).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up_environment ""
cd "$REPOSITORY"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true

# One rank on each GPU, at most two; without GPUs, two ranks on the CPU that divide its cores.
read -r gpus cores port < <(python -c '
import os, socket, torch
gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(gpus, len(os.sched_getaffinity(0)), free.getsockname()[1])')
ranks=$((gpus == 1 ? 1 : 2))
export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu  # DeepSpeed detects this by itself, with warnings

python -m qa_deepspeed sample quickstart/sample
deepspeed --quiet --num_accelerators "$ranks" --master_port "$port" --module \
    qa_deepspeed train --config launch/quickstart.yaml "$@"

python - <<'END'
import json

with open("quickstart/run/metrics.json", encoding="utf-8") as file:
    metrics = json.load(file)
print(f"""
EM {metrics["exact"]:.1f}  F1 {metrics["f1"]:.1f}  on {metrics["total"]} held-out questions \
(answerable: F1 {metrics["HasAns_f1"]:.1f}, unanswerable: F1 {metrics["NoAns_f1"]:.1f})""")
END
cat <<END

model         quickstart/run  (any Transformers program loads it)
report        quickstart/run/report.html
predictions   quickstart/run/predictions.json, nbest_predictions.json, null_odds.json, metrics.json
TensorBoard   $VENV/bin/tensorboard --logdir quickstart
ask it        $VENV/bin/qa-deepspeed predict --model_name_or_path quickstart/run --question QUESTION --context CONTEXT

Next, your own data in SQuAD v2 format, with any checkpoint of the hub, on $ranks ranks:

  source $VENV/bin/activate
  OMP_NUM_THREADS=$OMP_NUM_THREADS deepspeed --quiet --num_accelerators $ranks --module qa_deepspeed train \\
      --model_name_or_path bert-base-uncased --train_file train-v2.0.json --predict_file dev-v2.0.json \\
      --version_2_with_negative --do_eval --deepspeed_config zero2 --output_dir runs/mine
END
