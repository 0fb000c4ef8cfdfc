"""Automatic reaction to alerts: an Alertmanager webhook pins serving to a version from before the incident."""
