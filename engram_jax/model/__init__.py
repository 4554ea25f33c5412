"""The network, and what every program that runs it is built from."""
