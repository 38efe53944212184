"""Finds the weight of the loss relative to a pixel loss."""
