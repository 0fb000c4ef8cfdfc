"""`springtide trial`: trainers with other settings that read the same training log in parallel with the live one."""
