"""What an operator sees: figures of the running loop, its accounts, one screen of text."""
