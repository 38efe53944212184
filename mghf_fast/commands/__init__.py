"""The command line and its applications: the library beside it imports nothing of them."""
