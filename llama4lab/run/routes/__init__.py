"""Where tokens go: changed, held, replayed, and told apart from what flows."""
