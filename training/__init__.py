"""Trains model bundles: configuration, simulated examples, the loop and its command."""
