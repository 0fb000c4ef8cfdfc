"""Each user's last events and the position in each source, committed together."""
