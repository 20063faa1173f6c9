"""The job: enforces the policy inside the training step and submits what happened."""
