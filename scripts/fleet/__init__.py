"""What `scripts/rollout` is made of."""
