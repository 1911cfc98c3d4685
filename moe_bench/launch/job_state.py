"""What can become of a job, in the words that people read, and what Slurm's own words mean."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    REQUEUED = "requeued"
    """Waiting for its next life, after a node failed or somebody asked for it."""
    DONE = "done"
    FAILED = "failed"
    OUT_OF_MEMORY = "out of memory"
    """Of a GPU or of a node."""
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it; what is unknown may be running."""
        return self not in (JobState.SUBMITTED, JobState.RUNNING, JobState.REQUEUED, JobState.UNKNOWN)


SLURM_STATES = {
    "PENDING": JobState.SUBMITTED,
    "CONFIGURING": JobState.RUNNING,
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "STAGE_OUT": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,
    "REQUEUED": JobState.REQUEUED,
    "REQUEUE_FED": JobState.REQUEUED,
    "REQUEUE_HOLD": JobState.REQUEUED,
    "SPECIAL_EXIT": JobState.REQUEUED,
    "COMPLETED": JobState.DONE,
    "BOOT_FAIL": JobState.FAILED,
    "FAILED": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "PREEMPTED": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "DEADLINE": JobState.TIMED_OUT,
    "TIMEOUT": JobState.TIMED_OUT,
    "CANCELLED": JobState.CANCELLED,
    "REVOKED": JobState.CANCELLED,
}
"""squeue(1), JOB STATE CODES. A word that is not here is UNKNOWN, and shown."""
