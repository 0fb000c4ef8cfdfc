"""The console: one page that shows the running loop and steers it, and the interface behind the page."""
