"""Floor 3: the layers, as Flax NNX modules without state changes, sharding or tables in them."""
