"""Each user's last events and the position of each source, committed together."""
