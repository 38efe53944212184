"""What developers alone run: compiled resources of the kernels, checks of wheels."""
