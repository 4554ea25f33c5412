"""Synthetic tasks: documents to train on and items to test with, made from a seed."""
