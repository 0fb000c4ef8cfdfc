"""Answers about users: one applier per host keeps the stores fresh, any number of workers read them."""
