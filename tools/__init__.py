"""What developers alone run: the slow checks, compiled resources of the kernels, checks of wheels."""
