"""The optimizers: schedule, clipping, Muon and AdamW, and row-wise Adam for the tables."""
