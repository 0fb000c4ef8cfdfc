"""The rules that hold an update before anybody is answered by it: pure, on log time, from what each step saw and scored."""
