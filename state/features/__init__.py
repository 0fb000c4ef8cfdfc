"""The feature spec, the kernel that computes a user's windows, and the mask of excluded clicks."""
