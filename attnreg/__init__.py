"""One front door to attention for PyTorch."""
