"""The console: a web page that shows and controls the running loop, and the page's HTTP interface."""
