"""What any training loop needs of a model: its head, its loss and its metrics."""
