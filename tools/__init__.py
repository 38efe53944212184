"""What developers alone run: slow checks, compiled resources of kernels, checks of wheels."""
