"""What an alert may do by itself: a webhook for Alertmanager that pins answers to a version from before the trouble."""
