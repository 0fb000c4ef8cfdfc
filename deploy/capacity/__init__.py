"""How large a deployment must be, and where it breaks first, computed from measured figures: `springtide capacity`."""
