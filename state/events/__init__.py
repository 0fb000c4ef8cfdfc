"""Clicks: decodes records into columns of events, with ids that contain no raw name."""
