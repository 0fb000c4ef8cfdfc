"""Serves predictions about users: one applier per host updates the stores, and any number of workers read them."""
