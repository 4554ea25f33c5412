"""The tables: rows looked up by address, updated row by row, on one device or over a mesh."""
