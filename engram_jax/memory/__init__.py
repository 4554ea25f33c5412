"""Floor 2: rows of the tables, undifferentiated: addresses in, rows out, row gradients back."""
