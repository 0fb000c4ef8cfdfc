"""What users and operators meet: serving, the command line, the local broker, the dashboards."""
