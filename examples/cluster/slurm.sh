#!/bin/bash
# SDXL by DMD2 with all weights on 8 nodes of 8 GPUs: `sbatch examples/cluster/slurm.sh`. One process for each GPU, so that Slurm's
# signals reach every one of them: five minutes before the time is up the run finishes its update, saves and ends with status 143,
# and the job goes back into the queue and on from there. --output must be on a file system that all nodes see.
#SBATCH --job-name=fastgen
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
cd "${SLURM_SUBMIT_DIR:-.}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# What torchrun would set, from what Slurm does. 64 processes of 2 samples are the recipe's joint batch of 128.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec fastgen distill "$@"' fastgen \
    configs/sdxl/dmd2.toml train.sharding=fsdp data.prompts=prompts.txt data.images=images \
    --output runs/sdxl-4step
status=$?

if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
