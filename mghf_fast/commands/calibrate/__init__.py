"""The weight of the loss beside a pixel loss."""
