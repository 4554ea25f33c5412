"""The tables: addresses in, exact rows out, row gradients back, on one device or over a mesh."""
