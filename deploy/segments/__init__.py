"""Keeps who is in which segment, beside serving; exports members, and finds the users who are like them."""
