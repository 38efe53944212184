"""Tools for developers: slow checks, compiled resources of kernels, checks of wheels."""
