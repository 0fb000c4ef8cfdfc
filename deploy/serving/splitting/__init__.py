"""Traffic splitting: during a rollout, the trial's workers answer a share of the users; each answer is an exposure."""
