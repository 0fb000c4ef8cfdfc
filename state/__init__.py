"""Contracts and stored state that all parts share; imports no other package of this repository."""
