"""The layers, as Flax NNX modules: no tables, no state changes; of a mesh they know `ShardView`."""
