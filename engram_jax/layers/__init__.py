"""The network's layers: pure Flax NNX modules without tables; they see a mesh as a `ShardView`."""
