"""What a trained memory does: where its gates open."""
