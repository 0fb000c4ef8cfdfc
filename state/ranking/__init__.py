"""What trainer and serving must compute alike when candidates are ranked: crosses and transitions."""
