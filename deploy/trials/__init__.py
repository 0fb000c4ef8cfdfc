"""`springtide trial`: second trainers of other settings on the same training log, beside the live one."""
