"""Floor 4: blocks, the transformer, and the state it carries while decoding."""
