"""Shows a run while it trains: TensorBoard, console, warnings."""
