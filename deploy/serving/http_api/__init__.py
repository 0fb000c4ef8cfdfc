"""The answers over HTTP: which endpoints there are, what each is asked, and what it answers."""
