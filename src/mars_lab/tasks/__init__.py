"""What is trained: everything the training loop doesn't know."""
