"""`springtide experiment`: tries other settings in parallel with the live trainer, on a share of users, and live."""
