"""Training proper: real text, schedules, validation, checkpoints."""
