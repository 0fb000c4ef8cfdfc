"""The rules that hold an update before serving uses it: pure functions, on log time, of each step's data and scores."""
