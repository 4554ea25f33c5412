"""The network and the static half of every program that runs it."""
