"""What is done to a model, in any loop: its head, its loss, its metrics."""
