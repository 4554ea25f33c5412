"""What happens to gradients: schedule, clipping, Muon, AdamW, row-wise Adam of the tables."""
