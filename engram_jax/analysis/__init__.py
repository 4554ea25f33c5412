"""Analysis of a trained memory: where its gates open."""
