"""Which mesh axis shards which dimension, and what code on one device must know of the others."""
