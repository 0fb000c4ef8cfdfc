"""What is agreed and what is remembered; imports nothing else of ours."""
