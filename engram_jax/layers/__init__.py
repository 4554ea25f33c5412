"""The network's layers: pure Flax NNX modules, no tables; of a mesh they use only `ShardView`."""
