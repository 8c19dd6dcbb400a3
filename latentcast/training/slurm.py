"""What SLURM asks of a training: to end before its time is up, and to go on in the same job, queued again."""

import logging
import os
import signal
import subprocess

logger = logging.getLogger("latentcast")

# What "#SBATCH --signal=USR1@120" sends. A handler of ours keeps Lightning's away, which would save in the middle of a
# step, into a checkpoint of its own.
SIGNAL = getattr(signal, "SIGUSR1", None)


def job():
    """The job, or the task of an array, that this process is part of, by its number; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue():
    """Queue this job again."""
    command = ["scontrol", "requeue", job()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        problem = done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.warning("%s: failed (%s); submit the job again", " ".join(command), " ".join(problem.split()))
    else:
        logger.info("job %s is queued again, and will go on from there", job())
