"""Into the topics: clicks, of recordings at their times or of synthetic shoppers, and attributes out of files."""
