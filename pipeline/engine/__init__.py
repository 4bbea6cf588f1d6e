"""The trainer: DeepSpeed set-up, schedule, loop, checkpoints, inference, metrics."""
