#!/bin/bash
# A Cloud TPU v5p slice of 16 chips (its name counts two cores each): four hosts, one process per host.
#   PROJECT=... ZONE=... SHARE=nfs-server:/share bash docs/recipes/tpu-slice.sh
# Repeat the last command to go on with a run that was interrupted.
set -euo pipefail
TPU="${TPU:-dsv4}"
WHERE=(--project="$PROJECT" --zone="$ZONE")

gcloud compute tpus tpu-vm create "$TPU" "${WHERE[@]}" --accelerator-type=v5p-32 --version=v2-alpha-tpuv5

# On every host: this package with the text that `mini` learns from, and one folder that all of them see.
gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=all --command="
  sudo mkdir -p /shared && sudo mount -t nfs $SHARE /shared"
gcloud compute tpus tpu-vm scp --recurse . "$TPU":dsv4-jax "${WHERE[@]}" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=all --command="
  python3 -m pip install --user uv && python3 -m uv venv --python 3.12 venv
  python3 -m uv pip install --python venv './dsv4-jax[tpu,prose]'"

# The same command on all hosts is one job: JAX asks the metadata server who the others are.
gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=all --command="
  source venv/bin/activate && export DSV4_CACHE=/shared/cache
  dsv4 train mini --out /shared/runs/mini --strategy expert-fsdp --mesh expert=8,fsdp=2"
