"""What stands in front of users and operators: serving, the command line, the local broker, the dashboards."""
