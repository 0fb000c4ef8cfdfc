"""Code that all processes share: start and end, signals, logs, kill points for tests, the name of the actor."""
