"""Floor 5: what happens to gradients: schedule, clipping, Muon, AdamW, row-wise Adam."""
