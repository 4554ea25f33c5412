"""Floor 7: studies of data and trained models."""
