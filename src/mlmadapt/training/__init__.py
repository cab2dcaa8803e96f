"""`accelerate_train`: the loop, and what surrounds it."""
