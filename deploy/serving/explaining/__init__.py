"""Why an answer is what it is: its difference from the one for unknown users, in parts, each with the events behind it."""
