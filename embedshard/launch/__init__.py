"""Launching: how processes come to train together."""
