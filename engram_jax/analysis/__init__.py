"""Looks inside a trained model: its layers, its gates, its memory's rows (docs/analysis.md)."""
